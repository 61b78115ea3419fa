"""Denoising schedules: the distribution of each step."""
