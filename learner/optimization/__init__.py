"""Optimizers, optimizer steps, and the micro-batch size."""
