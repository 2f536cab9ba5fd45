"""Prefill, decode and answers."""
