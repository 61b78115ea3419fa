"""The learning rate of every optimizer step: by hand, as torch's schedules have it, and in the learner."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.optimization.learning_rate import learning_rate
from tests.rounds import components_with, learner_of, sample_round

COSINE = {"warmup_steps": 2, "learning_rate_schedule": "cosine", "decay_steps": 6, "final_learning_rate": 2e-4}


def rates(steps: int, **keys: object) -> list[float]:
    settings = LearnerTable.model_validate({"batch_size": 1, "learning_rate": 1e-3, **keys})
    return [learning_rate(settings, step) for step in range(steps)]


def test_without_warmup_and_schedule_the_rate_is_exactly_the_recipes() -> None:
    assert rates(3) == [1e-3] * 3


def test_a_warmup_rises_linearly_to_the_full_rate() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_a_linear_schedule_falls_to_its_end_and_stays_there() -> None:
    linear = {"learning_rate_schedule": "linear", "decay_steps": 4, "final_learning_rate": 2e-4}
    assert rates(6, **linear) == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 2e-4])


def test_a_cosine_begins_after_the_warmup_and_is_halfway_in_the_middle() -> None:
    found = rates(8, **COSINE)
    assert found[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert found[4] == pytest.approx(6e-4) and found[6:] == pytest.approx([2e-4, 2e-4])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_are_those_of_torch(kind: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
    if kind == "cosine":
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-4)
    expected = []
    for _ in range(21):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = rates(21, learning_rate_schedule=kind, decay_steps=20, final_learning_rate=1e-4)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"decay_steps": 5}, "decay_steps is 5 and learning_rate_schedule 'constant'"),
        ({"final_learning_rate": 1e-4}, "final_learning_rate is 0.0001 and learning_rate_schedule 'constant'"),
        ({"learning_rate_schedule": "linear"}, "is 'linear', warmup_steps 0 and decay_steps None"),
        ({**COSINE, "decay_steps": 2}, "is 'cosine', warmup_steps 2 and decay_steps 2"),
        ({**COSINE, "final_learning_rate": 1e-2}, "final_learning_rate 0.01 is above learning_rate 0.001"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(keys: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rates(1, **keys)


def test_the_first_step_of_a_warmup_moves_every_weight_by_its_share(tables: dict) -> None:
    """AdamW's first step is proportional to the learning rate."""
    moves = []
    for warmup in (1, 4):
        keys = {"learner__batch_size": 8, "learner__weight_decay": 0, "learner__warmup_steps": warmup}
        components = components_with(tables, **keys)
        learner = learner_of(components)
        sampled, before = sample_round(components, learner.weights()[-1]), learner.weights()[-1].arrays()
        metrics, after = learner.update(sampled.batch, *sampled.trajectories)
        assert metrics["learning_rate"] == pytest.approx(1e-3 / warmup)
        moves.append({name: array - before[name] for name, array in after.weights[-1].arrays().items()})
    for name, whole in moves[0].items():
        np.testing.assert_allclose(moves[1][name], whole / 4, rtol=1e-2, atol=1e-6)


def test_a_resumed_learner_continues_the_schedule_to_the_same_bits(tables: dict, tmp_path: Path) -> None:
    """Two rounds of two optimizer steps and two inner epochs; round 1 begins at step 4."""
    keys = {f"learner__{name}": value for name, value in {**COSINE, "inner_epochs": 2}.items()}
    components = components_with(tables, **keys)
    learner = learner_of(components)
    first = sample_round(components, learner.weights()[-1])
    metrics, state = learner.update(first.batch, *first.trajectories)
    assert metrics["learning_rate"] == learning_rate(components.recipe.learner, 3)
    saved = save_checkpoint(Storage(tmp_path), Checkpoint(1, state, {}), keep=1)
    resumed = Learner(components.policy, components.algorithm, components.recipe)
    resumed.load_state(load_checkpoint(saved).learner)
    second = sample_round(components, learner.weights()[-1], 1)
    ends = [each.update(second.batch, *second.trajectories) for each in (learner, resumed)]
    assert ends[0][0]["learning_rate"] == learning_rate(components.recipe.learner, 7) == pytest.approx(2e-4)
    assert ends[0][1].trained.fingerprint == ends[1][1].trained.fingerprint != state.trained.fingerprint
