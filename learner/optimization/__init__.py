"""Optimizers, optimizer steps, and the size of micro-batches."""
