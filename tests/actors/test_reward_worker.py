"""The reward worker: batches cut in order, and nothing but one finite number an image lets through."""

from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward, RewardMistake
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.trajectory import ImageBatch

SEEN: list[tuple[list[int], list[str], list[dict[str, Any]]]] = []


class Brightness(Reward):
    """A reward that remembers what it was given."""

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            SEEN.append((images[:, 0, 0, 0].tolist(), prompts, metadata))
            return images[:, 0, 0, 0].astype(np.float64)

        return score


class Answers(Reward):
    """A reward that returns prepared results, one a batch."""

    answers: list[Any]

    def load(self, device: str) -> LoadedReward:
        left = list(self.answers)
        return lambda images, prompts, metadata: left.pop(0)


def images(count: int) -> ImageBatch:
    pixels = np.stack([np.full((4, 4, 3), 10 * index, np.uint8) for index in range(count)])
    return ImageBatch(pixels, tuple(Prompt(f"animal {index}", {"index": index}) for index in range(count)))


def worker(batch_size: int = 8, **rewards: Reward) -> RewardWorker:
    return RewardWorker(rewards, RewardPoolTable(batch_size=batch_size), RuntimeTable(device="cpu"))


def test_a_task_is_cut_into_batches_in_order_and_its_scores_aggregated_in_order() -> None:
    SEEN.clear()
    scores = worker(batch_size=2, brightness=Brightness()).score(images(5))
    assert scores.rewards["brightness"].tolist() == [0, 10, 20, 30, 40]
    assert scores.rewards["brightness"].dtype == np.float32 and scores.seconds > 0
    assert [seen[0] for seen in SEEN] == [[0, 10], [20, 30], [40]]
    assert SEEN[1][1:] == (["animal 2", "animal 3"], [{"index": 2}, {"index": 3}])


def test_every_reward_is_given_by_its_name() -> None:
    scores = worker(bright=Brightness(), given=Answers(answers=[np.array([3, 1, 2])])).score(images(3))
    assert {name: values.tolist() for name, values in scores.rewards.items()} == {
        "bright": [0, 10, 20],
        "given": [3, 1, 2],
    }


def test_tasks_scored_as_one_batch_get_their_scores_reasons_and_share_of_the_time() -> None:
    SEEN.clear()
    together = worker(bright=Brightness(), given=Answers(answers=[np.array([1.0, np.nan, 3.0])]))
    first, second = together.score_together(((1, 3), (0, 1)), images(3), images(2))
    assert [seen[0] for seen in SEEN] == [[10, 20, 0]] and SEEN[0][1] == ["animal 1", "animal 2", "animal 0"]
    assert first.rewards["bright"].tolist() == [10, 20] and second.rewards["bright"].tolist() == [0]
    assert first.dropped == {1: "the reward 'given' gave nan for the image of 'animal 2'"} and second.dropped == {}
    assert second.rewards["given"].tolist() == [3] and first.seconds == pytest.approx(2 * second.seconds)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1.0, 2.0], r"the reward 'given' returned float64 of shape \(2,\) for 3 images"),
        ([[1.0], [2.0], [3.0]], r"of shape \(3, 1\) for 3 images: it must return one real number for each"),
        (1.0, r"of shape \(\) for 3 images"),
        (["a", "b", "c"], r"returned <U1 of shape \(3,\)"),
        ([None, 1.0, 2.0], r"returned object of shape \(3,\)"),
        ([1j, 0j, 0j], r"returned complex128 of shape \(3,\)"),
        ([True, False, True], r"returned bool of shape \(3,\)"),
    ],
)
def test_what_is_not_one_real_number_a_image_is_refused(answer: Any, text: str) -> None:
    with pytest.raises(RewardMistake, match=text):
        worker(given=Answers(answers=[np.array(answer)])).score(images(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_dropped_with_the_image_it_belongs_to(value: float) -> None:
    scores = worker(given=Answers(answers=[np.array([1.0, value, 3.0])])).score(images(3))
    number = "nan" if np.isnan(value) else f"{value}, or a number beyond float32,"
    assert scores.dropped == {1: f"the reward 'given' gave {number} for the image of 'animal 1'"}
    assert scores.rewards["given"][[0, 2]].tolist() == [1, 3] and np.isnan(scores.rewards["given"][1])


def test_a_number_too_large_for_float32_is_not_passed_on_as_infinity() -> None:
    scores = worker(given=Answers(answers=[np.array([1.0, 1e300, 2.0])])).score(images(3))
    assert list(scores.dropped) == [1] and np.isnan(scores.rewards["given"][1])


def test_a_fault_in_a_later_batch_is_found_too() -> None:
    answers = [np.array([1.0, 2.0]), np.array([float("nan")])]
    assert list(worker(batch_size=2, given=Answers(answers=answers)).score(images(3)).dropped) == [2]


def test_a_part_of_a_task_is_scored_with_its_prompts_and_rows_from_its_first() -> None:
    SEEN.clear()
    scores = worker(brightness=Brightness()).score(images(5), 1, 4)
    assert scores.rewards["brightness"].tolist() == [10, 20, 30]
    assert SEEN[0][1] == ["animal 1", "animal 2", "animal 3"]
    aside = worker(given=Answers(answers=[np.array([1.0, np.nan])])).score(images(5), 3, 5).dropped
    assert aside == {1: "the reward 'given' gave nan for the image of 'animal 4'"}


class Raises(Reward):
    """A reward that breaks."""

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            raise ConnectionError("the service is down")

        return score


def test_an_error_of_a_reward_is_a_failure_that_a_retry_may_fix() -> None:
    with pytest.raises(ScoringFailed, match="the reward 'remote' raised ConnectionError: the service is down"):
        worker(remote=Raises()).score(images(2))


def test_one_by_one_every_image_is_noted_before_it_is_scored() -> None:
    SEEN.clear()
    noted: list[int] = []
    scores = worker(brightness=Brightness()).score(images(5), 1, 4, noted.append)
    assert noted == [1, 2, 3] and [seen[0] for seen in SEEN] == [[10], [20], [30]]
    assert scores.rewards["brightness"].tolist() == [10, 20, 30]


class Asserts(Reward):
    """A reward whose kernel has found something on the GPU."""

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            raise RuntimeError("CUDA error: device-side assert triggered")

        return score


def test_an_assertion_on_the_gpu_is_recognized() -> None:
    for reward, poisoned in ((Asserts(), True), (Raises(), False)):
        with pytest.raises(ScoringFailed) as error:
            worker(mine=reward).score(images(2))
        assert error.value.poisoned == poisoned


class ChangesTorch(Reward):
    """A reward that changes torch's settings for the process, as some models' code does."""

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(torch.get_num_threads() + 1)
            return np.zeros(len(images))

        torch.set_grad_enabled(False)
        return score


def test_torch_settings_that_a_reward_changes_are_restored() -> None:
    ready = worker(changes=ChangesTorch())
    before = torch.get_num_threads()
    ready.score(images(2))
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == before
