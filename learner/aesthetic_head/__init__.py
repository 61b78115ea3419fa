"""Rated images on their way to a head: their table, their splits, their embeddings, and how well ratings agree."""
