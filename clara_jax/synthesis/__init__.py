"""Talking to language models over HTTP."""
