"""What a run logs, for tests of what is made of it."""


def logged(round: int, **changes: float) -> dict[str, float]:
    """The metrics of a round, as far as a report reads them."""
    parts = {f"seconds/{part}": 2.0 for part in ("sample", "score", "learn", "round", "wait")}
    idle = {f"idle/{role}": 0.25 for role in ("sampler", "reward_worker", "learner")}
    rewards = {"reward/mean": 1.0 + round, "reward/std": 0.5, "kl_nats": 0.01}
    return {"round": float(round), "images": 8.0, "images_dropped": 0.0, **parts, **idle, **rewards, **changes}
