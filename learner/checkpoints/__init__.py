"""Checkpoints: their files, the state in them, and how a run resumes from one."""
