"""Evaluation in actors: fixed prompts and seeds, sampled and scored in the same way at every version."""
