"""The learner side: algorithms, optimization, checkpoints."""
