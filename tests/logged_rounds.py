"""Metrics of a round, for tests of their readers."""


def logged(round_index: int, **changes: float) -> dict[str, float]:
    """Return the metrics of a round that a report reads."""
    parts = {f"seconds/{part}": 2.0 for part in ("sample", "score", "learn", "round", "wait")}
    idle = {f"idle/{role}": 0.25 for role in ("sampler", "reward_worker", "learner")}
    rewards = {"reward/mean": 1.0 + round_index, "reward/std": 0.5, "kl_nats": 0.01}
    return {"round": float(round_index), "images": 8.0, "images_dropped": 0.0, **parts, **idle, **rewards, **changes}
