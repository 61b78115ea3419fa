"""Shared by samplers, reward workers, learner and driver: recipe, schedule, records, policy, run folder, trackers."""
