"""Rows, tokenizers, token layouts and batches."""
