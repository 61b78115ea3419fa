"""Held-out evaluation in actors: fixed prompts and seeds, sampled and scored in the same way for every policy version."""
