"""Serving trained checkpoints."""
