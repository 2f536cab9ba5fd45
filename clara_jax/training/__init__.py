"""Stages, optimizer, step, loop and checkpoints."""
