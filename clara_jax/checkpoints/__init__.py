"""Checkpoints of every format: ours, Hugging Face, PEFT, GGUF, the released code's."""
