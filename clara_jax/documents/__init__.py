"""Documents as people have them: text, Markdown, HTML, PDF, Office files, JSONL, Wikipedia extracts
and folders of these, read (`reading.py`) and cut in pieces that a compressor reads as a whole
(`pieces.py`)."""
