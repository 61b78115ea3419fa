"""A clip range given in nats clips the same share at any resolution; one given on the mean scale does not."""

import pytest

from tests.gradients import ONE_STEP
from tests.rounds import components_with, learner_of, sample_round, stale

NATS = [-2.0, -0.5, 0.5, 2.0]  # by which steps have moved since they were sampled


def clip_fraction(tables: dict, resolution: int, clip: dict[str, float]) -> float:
    """Return the clip fractions of an update at this resolution, after every step has moved by one of NATS."""
    tables = {**tables, "algorithm": {"name": "ddpo_is", **clip}}
    components = components_with(tables, policy__resolution=resolution, **ONE_STEP)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    elements = sampled.trajectories[0].latents[0, 0].numel()
    assert elements == 4 * (resolution // 2) ** 2
    moved = stale(sampled, [nats / elements for nats in NATS])
    metrics, _ = learner.update(moved.batch, *moved.trajectories)
    return metrics["clip_fraction"]


@pytest.mark.thorough
def test_a_recipe_at_twice_the_resolution_clips_the_same_share_with_clip_nats(tables: dict) -> None:
    shares = [clip_fraction(tables, resolution, {"clip_nats": 1.0}) for resolution in (16, 32)]
    assert shares[0] == shares[1] and 0.2 < shares[0] < 0.8  # exactly those that moved by 2 nats


def test_with_clip_range_it_does_not(tables: dict) -> None:
    clip = {"clip_range": 1.0 / (4 * 8 * 8)}  # 1 nat at 16 pixels, 4 nats at 32
    assert clip_fraction(tables, 16, clip) == clip_fraction(tables, 16, {"clip_nats": 1.0})
    assert clip_fraction(tables, 32, clip) == 0


def test_the_clip_fraction_is_reported_by_step(tables: dict) -> None:
    components = components_with({**tables, "algorithm": {"name": "ddpo_is", "clip_nats": 1.0}}, **ONE_STEP)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    moved = stale(sampled, [nats / 256 for nats in NATS])
    metrics, _ = learner.update(moved.batch, *moved.trajectories)
    of_steps = [metrics[f"clip_fraction/step_{step:02d}"] for step in range(4)]
    assert sum(of_steps) / 4 == pytest.approx(metrics["clip_fraction"])
