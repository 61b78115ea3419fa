"""Earlier rounds that are trained on again: exact importance weights, the same bits after a resume, and refusals."""

import re

import numpy as np
import pytest
import torch

from ray_ddpo import cli
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.rollout import score
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import Rollout, Scored, Scores, TaskReport, TrainBatch
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.replay_buffer import with_replayed
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.rounds import SampledRound, components_with, learner_of, sample_round


@pytest.fixture
def replaying(tables: dict) -> dict:
    tables["prompts"] |= {"images_per_prompt": 2}
    off_policy = {"ratio": "proximal", "importance_weight": 10.0}
    tables["algorithm"] = {"name": "grpo", "clip_range": 1e-3, "off_policy": off_policy}
    tables["learner"] |= {"replay_rounds": 2}
    return tables


def trained(tables: dict, resume: bool = False) -> tuple[dict[str, float], str]:
    recipe = Recipe.parse(tables)
    metrics = run_training(recipe, serial=True, resume=resume)
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None
    return metrics, load_checkpoint(newest).learner.trained.fingerprint


def scored_round(round_index: int, advantages: list[float], dropped: tuple[int, ...] = ()) -> Scored:
    """Return a round of one task without trajectories."""
    count = len(advantages)
    report = TaskReport(Task(round_index, 0, round_index, (Prompt("cat"),) * count, tuple(range(count))), "", 0, 0, 0.0)
    rollout = Rollout(report, Scores({}, 0.0), f"trajectories of round {round_index}", None)
    return TrainBatch(round_index, (report,), np.array(advantages, np.float64), dropped), [rollout]


def test_earlier_rounds_follow_the_current_one() -> None:
    nan = float("nan")
    current, earlier = scored_round(2, [5, nan], (1,)), [scored_round(0, [1, 2]), scored_round(1, [nan, 4], (0,))]
    batch, rollouts = with_replayed(current, earlier)
    assert batch.round == 2 and np.array_equal(batch.advantages, [5, nan, 1, 2, nan, 4], equal_nan=True)
    assert batch.dropped == (1, 4) and batch.replayed == (2, 3, 4, 5)
    assert [rollout.trajectory for rollout in rollouts] == [f"trajectories of round {each}" for each in (2, 0, 1)]
    assert with_replayed(current, []) is current and current[0].replayed == ()


def as_scored(sampled: SampledRound) -> Scored:
    pairs = zip(sampled.batch.reports, sampled.trajectories, strict=True)
    return sampled.batch, [Rollout(report, Scores({}, 0.0), trajectory, None) for report, trajectory in pairs]


def test_replayed_transitions_are_weighted_by_the_exact_ratio_of_policies(replaying: dict) -> None:
    """The weight is π before the update over π that sampled: 1 for the round's own images, by `score` for others."""
    components = components_with(replaying, learner__learning_rate=3e-2)
    learner = learner_of(components)
    first = sample_round(components, learner.weights()[-1], 0)
    learner.update(first.batch, *first.trajectories)
    weights = learner.weights()[-1]
    batch, rollouts = with_replayed(as_scored(sample_round(components, weights, 1)), [as_scored(first)])
    metrics, _ = learner.update(batch, *(rollout.trajectory for rollout in rollouts))

    recipe = components.recipe
    policy = Sampler(components.policy, recipe.sampling, recipe.runtime)._policy
    policy.load_weights(weights)
    ratios = [(score(policy, each) - each.log_probs).double().exp() for each in first.trajectories]
    replayed = torch.cat(ratios).flatten()
    expected = (len(replayed) + float(replayed.sum())) / (2 * len(replayed))
    print(f"mean importance weight {expected:.6f}, of replayed transitions {float(replayed.mean()):.6f}")
    assert abs(expected - 1) > 1e-5
    assert metrics["importance_weight/mean"] - 1 == pytest.approx(expected - 1, rel=2e-2)
    assert metrics["optimizer_steps"] == 4  # of four images each, from two rounds of eight


def test_the_learner_keeps_the_versions_of_replayed_rounds(replaying: dict) -> None:
    components = components_with({**replaying, "max_policy_lag": 1})
    learner = learner_of(components)
    for round_index in range(5):
        version = max(0, round_index - 1)
        weights = next(each for each in learner.weights() if each.policy_version == version)
        sampled = sample_round(components, weights, round_index)
        learner.update(sampled.batch, *sampled.trajectories)
    assert [each.policy_version for each in learner.weights()] == [2, 3, 4, 5]


@pytest.mark.rotated(every=3, group="resumed")
@pytest.mark.parametrize("lag", [0, 1])
def test_a_resumed_run_has_the_same_bits(replaying: dict, lag: int) -> None:
    replaying |= {"rounds": 4, "checkpoint": {"every": 1}, "max_policy_lag": lag}
    replaying["sampling"] |= {"num_steps": 2}
    metrics, whole = trained(replaying)
    assert metrics["optimizer_steps"] == 6 and metrics["images"] == 8
    trained({**replaying, "name": "parted", "rounds": 3})
    assert trained({**replaying, "name": "parted"}, resume=True)[1] == whole
    without = {**replaying["learner"], "replay_rounds": 0}
    assert trained({**replaying, "name": "without", "learner": without})[1] != whole


@pytest.mark.rotated(every=2, group="longest")
def test_a_refilled_round_is_replayed_with_its_further_groups(replaying: dict) -> None:
    replaying |= {"rounds": 3, "checkpoint": {"every": 1}}
    replaying["reward"] = {"name": "function", "path": "tests.user_functions:seldom"}
    replaying["algorithm"] |= {"selection": {"refill": 20}}
    metrics, whole = trained(replaying)
    assert metrics["optimizer_steps"] == 6
    trained({**replaying, "name": "parted", "rounds": 2})
    assert trained({**replaying, "name": "parted"}, resume=True)[1] == whole


@pytest.mark.parametrize(
    ("algorithm", "learner", "said"),
    [
        ({"name": "dpo"}, {}, "takes no ratio to the log-probs"),
        ({"name": "ddpo_is"}, {}, 'give "group" or "round"'),
        ({"name": "grpo", "off_policy": {"max_drift_nats": 1.0}}, {}, "needs behavior_means of one policy"),
        ({"name": "grpo"}, {"parts_per_round": 2}, "earlier rounds are added to a complete round"),
    ],
)
def test_a_recipe_that_cannot_replay_is_refused(replaying: dict, algorithm: dict, learner: dict, said: str) -> None:
    replaying["algorithm"] = algorithm
    replaying["learner"] |= {"micro_batch_size": 4, **learner}
    with pytest.raises(ValueError, match=re.escape(said)):
        components_of(Recipe.parse(replaying))


def test_plan_counts_the_images_of_earlier_rounds(replaying: dict, capsys: pytest.CaptureFixture) -> None:
    from pathlib import Path

    import tomli_w

    file = Path(replaying["output_dir"]).parent / "recipe.toml"
    file.write_text(tomli_w.dumps(replaying))
    assert cli.main(["plan", str(file)]) == 0
    assert "6 = about 24 with those of 2 earlier rounds / (4 × 1 accumulated)" in capsys.readouterr().out
