"""Search over memory tokens."""
