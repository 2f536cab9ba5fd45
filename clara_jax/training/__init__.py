"""Stages, optimizer, step and trainer."""
