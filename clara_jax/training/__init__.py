"""Stages, optimiser, step, loop and checkpoints."""
