"""Metrics of a round, and what they say about a run."""
