"""Checkpoints: their files, the state in them, and where a run resumes."""
