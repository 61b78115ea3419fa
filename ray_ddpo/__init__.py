"""Reinforcement-learning fine-tuning of diffusion models on Ray."""
