"""Held-out evaluation in actors: fixed prompts and seeds, sampled in the same way for every policy version."""
