"""A learner whose network is replayed as CUDA graphs has the bits of an eager one, on rounds of a replayed sampler."""

import pytest

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.learner import Learner
from tests.graph_recorder import Counted
from tests.rounds import components_with, learner_of, sample_round

FULL = {"learner__micro_batch_size": 2, "learner__inner_epochs": 2}


def replayed(components: Components) -> tuple[Learner, Counted]:
    learner, recorders = learner_of(components), Counted()
    learner._policy.record_graphs(recorders)  # pyright: ignore[reportCallIssue]
    return learner, recorders


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [
        ({"name": "ddpo_is"}, {}),
        ({"name": "ddpo_is", "kl_coef": 0.1}, {"policy__dtype": "bfloat16", "learner__micro_batch_size": 8}),
        ({"name": "diffusion_nft"}, {"prompts__images_per_prompt": 2}),
    ],
    ids=str,
)
def test_rounds_are_learned_to_the_same_bits(algorithm: dict, keys: dict, tables: dict) -> None:
    components = components_with({**tables, "algorithm": algorithm}, **(FULL | keys))
    (learner, recorders), eager = replayed(components), learner_of(components)
    for round_index in range(2):
        sampled = sample_round(components, eager.weights()[-1], round_index)
        (metrics, state), (others, other) = (
            each.update(sampled.batch, *sampled.trajectories) for each in (learner, eager)
        )
        assert state.trained.fingerprint == other.trained.fingerprint
        assert metrics["grad_norm"] == others["grad_norm"] and metrics["loss"] == others["loss"]
    assert 0 < recorders.recorded < 12 < recorders.replays


def test_a_replayed_sampler_gives_the_images_and_log_probs_of_an_eager_one(tables: dict) -> None:
    components = components_with(tables)
    learner, sampler = learner_of(components), Sampler(*_of(components))
    recorders = Counted()
    sampler._policy.record_graphs(recorders)  # pyright: ignore[reportCallIssue]
    for round_index in range(2):
        weights = learner.weights()[-1]
        expected = sample_round(components, weights, round_index)
        tasks = round_tasks(components.recipe, round_index, components.prompts.load())
        sampled = [sampler.sample(task, weights)[0] for task in tasks]
        assert [each.image_fingerprints for each in sampled] == [
            each.image_fingerprints for each in expected.batch.reports
        ]
        metrics, _ = learner.update(expected.batch, *expected.trajectories)
        assert metrics["log_prob_check/max_abs"] == 0.0
    assert recorders.recorded == 1 and recorders.replays > 8


def _of(components: Components) -> tuple:
    return components.policy, components.recipe.sampling, components.recipe.runtime


def test_a_sleeping_sampler_keeps_no_recording_and_samples_the_same_afterwards(tables: dict) -> None:
    components = components_with(tables)
    weights, sampler = learner_of(components).weights()[-1], Sampler(*_of(components))
    recorders = Counted()
    sampler._policy.record_graphs(recorders)  # pyright: ignore[reportCallIssue]
    task = round_tasks(components.recipe, 0, components.prompts.load())[0]
    before = sampler.sample(task, weights)[0]
    assert sampler._policy.graphed.holds_memory
    sampler.sleep()
    assert not sampler._policy.graphed.holds_memory
    assert sampler.sample(task, weights)[0].image_fingerprints == before.image_fingerprints
    assert recorders.recorded == 2
