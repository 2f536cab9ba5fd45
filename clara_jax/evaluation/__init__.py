"""Scores, benchmarks and the logit lens."""
