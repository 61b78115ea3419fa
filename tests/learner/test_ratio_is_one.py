"""The ratio is exactly 1 before the first update: shown with a network that rounds by its batch, as some kernels do."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from tests.accepted_page import assert_accepted
from tests.gradients import ONE_STEP
from tests.rounds import components_with, learner_of, sample_round


@pytest.fixture
def rounds_by_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change every prediction by the number of rows and by its row, as the order of a matrix product may."""
    whole = DiffusersPolicy._predict

    def predict(self: DiffusersPolicy, *given: object) -> Tensor:
        output = whole(self, *given)
        places = torch.arange(len(output)).view(-1, 1, 1, 1)
        return output + 1e-4 * len(output) + 1e-5 * places

    monkeypatch.setattr(DiffusersPolicy, "_predict", predict)


@pytest.mark.parametrize("micro_batch_size", [4, 8])
def test_it_is_1_for_transitions_in_the_rows_of_the_samplers_batch(
    micro_batch_size: int, tables: dict, rounds_by_its_batch: None
) -> None:
    assert_accepted("micro-batches that are composed otherwise than a sampler's batches")
    learner = learner_of(
        components := components_with(tables, **{**ONE_STEP, "learner__micro_batch_size": micro_batch_size})
    )
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["log_prob_check/max_abs"] == 0.0  # the learner scores them in the batches that they were sampled in
    assert metrics["ratio/max_abs_log"] > 1e-6  # and learns from them in its own, of mixed steps and images


def test_the_proximal_ratio_is_1_at_a_rounds_first_step_whatever_the_batches_are(
    tables: dict, rounds_by_its_batch: None
) -> None:
    tables |= {"algorithm": {"name": "ddpo_is", "clip_range": 1e-12, "off_policy": {"ratio": "proximal"}}}
    learner = learner_of(components := components_with(tables, **ONE_STEP))
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["clip_fraction"] == 0.0
    expected = -np.float32(sampled.batch.advantages).clip(-5, 5).mean()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
