"""Held-out evaluation of policy versions beside the training, and the guard that looks for reward hacking."""
