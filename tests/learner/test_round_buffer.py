"""The round buffer: advantages in task order from weighted rewards, statistics that last, metrics by hand."""

import dataclasses

import numpy as np
import pytest

from ray_ddpo.common.metrics import round_metrics
from ray_ddpo.common.metrics.round_metrics import reward_metrics
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import Rollout, Scores, TaskReport, whole_round
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer, TooManyDropped
from tests.accepted_page import assert_accepted
from tests.reference.ddpo_reference import PerPromptTracker


def rollout(index: int, prompts: list[str], round_index: int = 0, **rewards: list[float]) -> Rollout:
    task = Task(round_index, index, 0, tuple(Prompt(text) for text in prompts), tuple(range(len(prompts))))
    scores = Scores({name: np.array(values, np.float32) for name, values in rewards.items()}, 1.0)
    return Rollout(TaskReport(task, "f", 1, 1, 1.0), scores, None, None)


def buffer(
    weights: dict[str, float],
    images_per_prompt: int = 1,
    max_dropped: int | None = None,
    parts_per_round: int = 1,
    **settings: object,
) -> RoundBuffer:
    algorithm = DDPOImportanceSampling(advantages=AdvantageSettings(**settings))
    return RoundBuffer(algorithm, RewardAggregation(weights), images_per_prompt, max_dropped, parts_per_round)


def test_advantages_stand_in_task_order() -> None:
    batch = buffer({"a": 1.0}, kind="round").train_batch(
        [rollout(0, ["cat", "dog"], a=[1, 2]), rollout(1, ["cow", "hen"], a=[3, 4])]
    )
    deviation = (5 / 4) ** 0.5  # of 1, 2, 3, 4
    assert batch.advantages == pytest.approx(np.array([-1.5, -0.5, 0.5, 1.5]) / deviation)
    assert [report.task.index for report in batch.reports] == [0, 1] and batch.round == 0


def test_several_rewards_are_summed_by_their_weights() -> None:
    weights, rollouts = {"a": 2.0, "b": -0.5}, [rollout(0, ["x", "y"], a=[1, 2], b=[4, 0])]
    metrics = reward_metrics(buffer(weights, kind="round").train_batch(rollouts), rollouts, weights)
    # 2 · 1 − 0.5 · 4 = 0 and 2 · 2 − 0 = 4
    assert metrics["reward/mean"] == 2 and metrics["reward/std"] == 2
    assert metrics["reward/a/mean"] == 1.5 and metrics["reward/b/mean"] == 2


def test_rows_of_one_text_are_one_prompt_to_its_statistics_and_groups_of_their_own() -> None:
    prompts = tuple(Prompt("two cats", {"place": place}) for place in (1, 1, 2, 2))
    report = TaskReport(Task(0, 0, 0, prompts, (1, 2, 3, 4)), "f", 1, 1, 1.0)
    rollouts = [Rollout(report, Scores({"a": np.array([1, 2, 5, 9], np.float32)}, 1.0), None, None)]
    per_prompt, groups = buffer({"a": 1.0}, min_count=1), buffer({"a": 1.0}, images_per_prompt=2, kind="group")
    tracker = PerPromptTracker(buffer_size=16, min_count=1)
    expected = tracker.update(["two cats"] * 4, [1, 2, 5, 9])
    assert per_prompt.train_batch(rollouts).advantages == pytest.approx(expected, rel=1e-5)
    assert groups.train_batch(rollouts).advantages == pytest.approx([-1, 1, -1, 1], rel=1e-3)
    assert_accepted("rows of one text and different metadata")


def test_metrics_by_hand() -> None:
    rollouts = [rollout(0, ["cat", "dog"], a=[1, 5]), rollout(1, ["cat", "cat"], a=[2, 3])]
    metrics = reward_metrics(buffer({"a": 1.0}, min_count=1).train_batch(rollouts), rollouts, {"a": 1.0})
    assert metrics["images"] == 4 and metrics["reward/mean"] == 2.75
    assert metrics["reward/prompt/cat"] == 2 and metrics["reward/prompt/dog"] == 5
    # cats −1, 0 and 1 by a deviation of √(2/3); the lone dog 0
    assert metrics["advantage/std"] == pytest.approx(((1.5 + 1.5) / 4) ** 0.5, rel=1e-5)


def test_prompts_have_metrics_of_their_own_where_they_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_metrics, "MOST_PROMPTS", 1)
    rollouts = [rollout(0, ["cat", "dog"], a=[1, 7])]
    metrics = reward_metrics(buffer({"a": 1.0}).train_batch(rollouts), rollouts, {"a": 1.0})
    assert not any(name.startswith("reward/prompt/") for name in metrics) and metrics["reward/mean"] == 4


def test_statistics_last_over_rounds_as_in_the_reference() -> None:
    ours, tracker = buffer({"a": 1.0}, buffer_size=5, min_count=3), PerPromptTracker(5, 3)
    generator = np.random.default_rng(0)
    for round_index in range(4):
        prompts = generator.choice(["cat", "dog", "cow"], 6).tolist()
        rewards = generator.normal(size=6).astype(np.float32).tolist()
        halves = [rollout(half, prompts[3 * half :][:3], round_index, a=rewards[3 * half :][:3]) for half in (0, 1)]
        batch = ours.train_batch(halves)
        assert batch.advantages == pytest.approx(tracker.update(prompts, rewards), rel=1e-5, abs=1e-6)
    assert ours.statistics == {"joined": {prompt: tuple(ring) for prompt, ring in tracker.rings.items()}}


def test_a_buffer_with_its_statistics_given_back_goes_on_as_before() -> None:
    first, second = buffer({"a": 1.0}, min_count=2), buffer({"a": 1.0}, min_count=2)
    first.train_batch([rollout(0, ["cat", "cat"], a=[1, 2])])
    second.statistics = first.statistics
    after = [rollout(0, ["cat", "dog"], round_index=1, a=[5, 6])]
    assert first.train_batch(after).advantages.tolist() == second.train_batch(after).advantages.tolist()


def test_tasks_out_of_order_or_of_two_rounds_are_our_own_error() -> None:
    in_order = [rollout(0, ["cat"], a=[1]), rollout(1, ["dog"], a=[2])]
    with pytest.raises(AssertionError, match="in task order"):
        buffer({"a": 1.0}).train_batch(in_order[::-1])
    with pytest.raises(AssertionError, match="of one round"):
        buffer({"a": 1.0}).train_batch([in_order[0], rollout(1, ["dog"], round_index=1, a=[2])])


def with_failures(rollout: Rollout, dropped: dict[int, str]) -> Rollout:
    """The rollout after its reward has failed at these rows."""
    rewards = {name: values.copy() for name, values in rollout.scores.rewards.items()}
    for values in rewards.values():
        values[list(dropped)] = np.nan
    return dataclasses.replace(rollout, scores=Scores(rewards, 1.0, dropped))


def test_a_group_is_set_aside_whole_and_the_rest_is_worth_what_it_is_without_it() -> None:
    ours = buffer({"a": 1.0}, images_per_prompt=2, kind="round")
    # Groups of the round: cats 1, 2; dogs 3, ?; cows 5, 9. Tasks cut the dogs in two.
    first = rollout(0, ["cat", "cat", "dog"], a=[1, 2, 3])
    second = with_failures(rollout(1, ["dog", "cow", "cow"], a=[0, 5, 9]), {0: "it hung"})
    batch = ours.train_batch([first, second])
    metrics = reward_metrics(batch, [first, second], {"a": 1.0})
    deviation = ((3.25**2 + 2.25**2 + 0.75**2 + 4.75**2) / 4) ** 0.5  # of 1, 2, 5, 9 around 4.25
    expected = np.array([-3.25, -2.25, np.nan, np.nan, 0.75, 4.75]) / deviation
    assert batch.advantages == pytest.approx(expected, nan_ok=True)
    assert batch.dropped == (2, 3) and ours.dropped == {0: [2, 3]}
    assert metrics["images"] == 6 and metrics["images_dropped"] == 2
    assert metrics["reward/mean"] == metrics["reward/a/mean"] == 4.25
    assert metrics["reward/std"] == pytest.approx(deviation) and metrics["advantage/std"] == pytest.approx(1)
    assert "reward/prompt/dog" not in metrics and metrics["reward/prompt/cow"] == 7


def test_statistics_of_a_prompt_do_not_know_what_was_set_aside() -> None:
    ours, tracker = buffer({"a": 1.0}, min_count=2), PerPromptTracker(32, 2)
    batch = ours.train_batch([with_failures(rollout(0, ["cat", "cat", "cat", "dog"], a=[1, 0, 4, 2]), {1: "x"})])
    assert ours.statistics == {"joined": {"cat": (1.0, 4.0), "dog": (2.0,)}}
    expected = tracker.update(["cat", "cat", "dog"], [1.0, 4.0, 2.0])
    assert np.delete(batch.advantages, 1) == pytest.approx(expected) and np.isnan(batch.advantages[1])


def test_a_round_without_failures_sets_nothing_aside() -> None:
    ours = buffer({"a": 1.0}, max_dropped=0, kind="round")
    batch = ours.train_batch([rollout(0, ["cat", "dog"], a=[1, 2])])
    assert batch.dropped == () and ours.dropped == {}


def test_a_round_learned_from_again_sets_aside_what_it_did_before_and_counts_it_once() -> None:
    ours = buffer({"a": 1.0}, max_dropped=1, kind="round")
    failed = [with_failures(rollout(0, ["cat", "dog", "cow"], a=[1, 2, 3]), {1: "it hung"})]
    before = ours.train_batch(failed)
    for again in (failed, [rollout(0, ["cat", "dog", "cow"], a=[1, 2, 3])]):
        assert ours.train_batch(again).advantages == pytest.approx(before.advantages, nan_ok=True)
    assert ours.dropped == {0: [1]}


def test_one_more_than_the_run_may_lose_ends_it_with_count_limit_and_three_reasons() -> None:
    ours = buffer({"a": 1.0}, images_per_prompt=2, max_dropped=4, kind="round")
    ours.train_batch([with_failures(rollout(0, ["cat"] * 4, a=[1, 2, 3, 4]), {0: "first", 1: "second"})])
    ours.train_batch([with_failures(rollout(0, ["cat"] * 4, round_index=1, a=[1, 2, 3, 4]), {3: "third"})])
    assert sum(len(images) for images in ours.dropped.values()) == 4
    text = "6 images of this run .* groups of 2 counted, and at most 4 may be; the reasons: fourth; third; second$"
    with pytest.raises(TooManyDropped, match=text):
        ours.train_batch([with_failures(rollout(0, ["cat"] * 4, round_index=2, a=[1, 2, 3, 4]), {2: "fourth"})])


def test_a_limit_counts_what_a_checkpoint_brought_back() -> None:
    ours = buffer({"a": 1.0}, max_dropped=2, kind="round")
    ours.dropped = {0: [3], 4: [0]}
    with pytest.raises(TooManyDropped, match="3 images of this run"):
        ours.train_batch([with_failures(rollout(0, ["cat", "dog"], round_index=5, a=[1, 2]), {0: "it hung"})])


def test_a_round_of_which_nothing_is_left_ends_the_run() -> None:
    with pytest.raises(TooManyDropped, match="all 2 images of round 0 are dropped: nothing is left.*it hung"):
        buffer({"a": 1.0}, images_per_prompt=2).train_batch(
            [with_failures(rollout(0, ["cat", "cat"], a=[1, 2]), {0: "it hung"})]
        )


def test_a_part_is_held_against_the_rewards_up_to_it_and_no_later_ones() -> None:
    ours, tracker = buffer({"a": 1.0}, min_count=2, parts_per_round=2), PerPromptTracker(32, 2)
    halves = [rollout(0, ["cat", "cat", "dog"], a=[1, 2, 9]), rollout(1, ["cat", "dog", "dog"], a=[6, 3, 5])]
    batches = [ours.train_batch([half]) for half in halves]
    for batch, prompts, rewards in zip(
        batches, (["cat", "cat", "dog"], ["cat", "dog", "dog"]), ([1, 2, 9], [6, 3, 5]), strict=True
    ):
        assert batch.advantages == pytest.approx(tracker.update(prompts, rewards), rel=1e-5, abs=1e-6)
    assert [(batch.part, batch.parts) for batch in batches] == [(0, 2), (1, 2)]
    whole = whole_round(batches)
    assert whole.advantages.tolist() == [*batches[0].advantages, *batches[1].advantages]
    assert [report.task.index for report in whole.reports] == [0, 1] and (whole.part, whole.parts) == (0, 1)
    metrics = reward_metrics(whole, halves, {"a": 1.0})
    assert metrics["images"] == 6 and metrics["reward/prompt/cat"] == 3


def test_a_part_may_be_set_aside_whole_and_images_are_numbered_in_the_round() -> None:
    ours = buffer({"a": 1.0}, images_per_prompt=2, kind="round", parts_per_round=2)
    first, second = rollout(0, ["cat", "cat"], a=[1, 2]), rollout(1, ["dog", "dog"], a=[3, 4])
    batches = [ours.train_batch([first]), ours.train_batch([with_failures(second, {1: "it hung"})])]
    assert [batch.dropped for batch in batches] == [(), (0, 1)] and ours.dropped == {0: [2, 3]}
    assert np.isnan(batches[1].advantages).all()
    whole = whole_round(batches)
    assert whole.dropped == (2, 3)
    assert reward_metrics(whole, [first, second], {"a": 1.0})["images_dropped"] == 2


def test_a_round_whose_parts_are_all_set_aside_ends_the_run() -> None:
    ours = buffer({"a": 1.0}, kind="round", parts_per_round=2)
    ours.train_batch([with_failures(rollout(0, ["cat"], a=[1]), {0: "it hung"})])
    with pytest.raises(TooManyDropped, match="all 2 images of round 0"):
        ours.train_batch([with_failures(rollout(1, ["dog"], a=[1]), {0: "it hung again"})])


def test_a_part_that_the_recipe_does_not_have_is_our_own_error() -> None:
    with pytest.raises(AssertionError, match="no more parts"):
        buffer({"a": 1.0}).train_batch([rollout(1, ["dog"], a=[1])])


def test_a_reward_that_is_not_finite_and_has_no_reason_is_our_own_error() -> None:
    with pytest.raises(AssertionError, match="dropped with its reason"):
        buffer({"a": 1.0}).train_batch([rollout(0, ["cat", "dog"], a=[1, float("nan")])])
