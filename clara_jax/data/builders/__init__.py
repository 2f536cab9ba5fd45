"""TFDS builders: JSONL rows of a stage as ArrayRecord files, which Grain reads at random (extra
`records`)."""
