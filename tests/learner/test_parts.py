"""Training on a round in parts: the same bits however often a part is begun again, and nothing out of order."""

import numpy as np
import pytest

from ray_ddpo.common.schedule import round_parts, transition_order
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.learner import Learner
from tests.rounds import SampledRound, components_with, learner_of, sample_round, stale


@pytest.fixture
def components(tables: dict) -> Components:
    """Return a recipe with two parts of two tasks of two images, and one optimizer step a part."""
    changes = {"sampling__batch_size": 2, "sampling__batches_per_round": 4, "max_policy_lag": 1}
    return components_with(
        tables, **changes, learner__batch_size=4, learner__micro_batch_size=2, learner__parts_per_round=2
    )


def halves(sampled: SampledRound, count: int = 2) -> list[SampledRound]:
    """Cut the round into its parts."""
    batch, size = sampled.batch, len(sampled.trajectories) // count
    images = len(batch.advantages) // count
    return [
        SampledRound(
            TrainBatch(
                batch.round,
                batch.reports[part * size : (part + 1) * size],
                batch.advantages[part * images : (part + 1) * images],
                part=part,
                parts=count,
            ),
            sampled.trajectories[part * size : (part + 1) * size],
        )
        for part in range(count)
    ]


def test_the_tasks_of_each_part(components: Components) -> None:
    assert round_parts(components.recipe) == [range(2), range(2, 4)]


def test_each_part_keeps_the_order_of_its_images_among_all_of_the_round() -> None:
    whole = transition_order(3, 5, 1, 12).tolist()
    for part in range(3):
        own = transition_order(3, 5, 1, 4, (part, 3)) + 4 * part
        assert own.tolist() == [image for image in whole if image // 4 == part]


def one_after_the_other(learner: Learner, sampled: SampledRound) -> tuple[dict[str, float], np.ndarray]:
    first, last = halves(sampled)
    learner.begin(first.batch, *first.trajectories)
    metrics, after = learner.update(last.batch, *last.trajectories)
    return metrics, after.weights[-1].buffer


def test_two_parts_are_two_updates_with_nothing_published_between(components: Components) -> None:
    in_parts, in_rounds = learner_of(components), learner_of(components)
    sampled = sample_round(components, in_parts.weights()[-1])
    before = in_parts.weights()
    first, last = halves(sampled)
    in_parts.begin(first.batch, *first.trajectories)
    assert in_parts.weights() == before
    metrics, after = in_parts.update(last.batch, *last.trajectories)
    for part in halves(sampled):
        own_round = TrainBatch(0, part.batch.reports, part.batch.advantages)
        _, expected = in_rounds.update(own_round, *part.trajectories)
    assert after.policy_version == 1 and expected.policy_version == 2
    moved = np.abs(expected.weights[-1].buffer - before[-1].buffer).max()
    # The images of a step are added up in another order, which AdamW shows at single weights: how far depends on the
    # processor.
    assert np.abs(after.weights[-1].buffer - expected.weights[-1].buffer).mean() < 0.002 * moved
    assert metrics["optimizer_steps"] == 2 and metrics["ratio/max_abs_log"] < 1e-5
    assert metrics["log_prob_check/max_abs"] < 1e-5, "the second part is checked under the weights that sampled it"


def test_the_second_part_is_trained_on_with_the_weights_that_the_first_one_left(components: Components) -> None:
    """The policy has changed since the images were sampled; in a single part the ratio would be 1."""
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = one_after_the_other(learner, sampled)
    assert metrics["ratio/max"] - metrics["ratio/min"] > 1e-5


def test_what_was_begun_is_undone_by_the_state_before_it(components: Components) -> None:
    learner = learner_of(components)
    state = learner.state()
    sampled = sample_round(components, learner.weights()[-1])
    first = halves(sampled)[0]
    learner.begin(first.batch, *first.trajectories)
    learner.load_state(state)
    metrics, after = one_after_the_other(learner, sampled)
    calm = learner_of(components)
    expected_metrics, expected = one_after_the_other(calm, sampled)
    assert np.array_equal(after, expected)
    assert {**metrics, "seconds/learn": 0} == {**expected_metrics, "seconds/learn": 0}


def test_a_part_that_was_sampled_with_other_weights_is_refused(components: Components) -> None:
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    first, last = halves(sampled)[0], halves(stale(sampled, [0.01]))[1]
    learner.begin(first.batch, *first.trajectories)
    with pytest.raises(RuntimeError, match="other weights"):
        learner.update(last.batch, *last.trajectories)


def test_a_part_whose_images_are_all_dropped_moves_nothing(components: Components) -> None:
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    first, last = halves(sampled)
    learner.begin(first.batch, *first.trajectories)
    nothing = np.full(4, np.nan)
    aside = TrainBatch(0, last.batch.reports, nothing, (0, 1, 2, 3), part=1, parts=2)
    metrics, after = learner.update(aside, *last.trajectories)
    assert metrics["optimizer_steps"] == 2 and metrics["optimizer_steps_skipped"] == 1
    assert np.isnan(metrics["kl_nats"]) and np.isfinite(after.weights[-1].buffer).all()


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("which", ["the last one first", "the first one twice", "the last one begun"])
def test_parts_out_of_order_are_our_own_error(components: Components, which: str) -> None:
    learner = learner_of(components)
    first, last = halves(sample_round(components, learner.weights()[-1]))
    with pytest.raises(AssertionError, match="part"):
        if which == "the last one first":
            learner.update(last.batch, *last.trajectories)
        elif which == "the last one begun":
            learner.begin(last.batch, *last.trajectories)
        else:
            learner.begin(first.batch, *first.trajectories)
            learner.begin(first.batch, *first.trajectories)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learner__parts_per_round": 3}, "batches_per_round = 4 tasks, which learner.parts_per_round = 3"),
        ({"learner__batch_size": 8}, "learner.parts_per_round = 4 images, which an optimizer step's"),
        ({"prompts__images_per_prompt": 8}, "learner.parts_per_round = 4 images, which prompts.images_per_prompt = 8"),
        ({"learner__parts_per_round": 0}, "parts_per_round"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_numbers(tables: dict, changes: dict, text: str) -> None:
    shape = {"sampling__batch_size": 2, "sampling__batches_per_round": 4, "learner__batch_size": 4}
    shape |= {"learner__micro_batch_size": 2, "learner__parts_per_round": 2}
    with pytest.raises(ValueError, match=text):
        components_with(tables, **{**shape, **changes})
