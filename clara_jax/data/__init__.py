"""Rows, token layouts, batches, and the generated world."""
