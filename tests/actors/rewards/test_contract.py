"""The contract of a reward: what may be returned, how it is called, and what is refused with which words."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.contract import check_signature, scores_of, under_contract
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward, RewardMistake
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.trajectory import ImageBatch
from tests import user_functions

VALUES = [0.5, -2.0, 3.25]  # exact in every type
IMAGES = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (10, 100, 200)])


@pytest.mark.parametrize(
    "answer",
    [
        VALUES,
        tuple(VALUES),
        np.array(VALUES),
        np.array(VALUES, np.float16),
        torch.tensor(VALUES, requires_grad=True) * 1,
        torch.tensor(VALUES, dtype=torch.bfloat16),
        torch.tensor(VALUES, dtype=torch.float16),
        torch.tensor(VALUES, dtype=torch.float64),
        [torch.tensor(value, requires_grad=True) for value in VALUES],
        [np.float32(value) for value in VALUES],
        (torch.tensor(VALUES), {}),
        (VALUES, [{"a": 1}, {}, {}]),
        (np.array(VALUES), None),
    ],
    ids=lambda answer: f"{type(answer).__name__} {getattr(answer, 'dtype', '')}",
)
def test_every_unambiguous_form_of_scores_is_accepted(answer: Any) -> None:
    scores = scores_of(answer, 3, "the reward")
    assert scores.tolist() == VALUES and scores.dtype == np.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_is_accepted() -> None:
    assert scores_of(torch.tensor(VALUES, device="cuda", requires_grad=True), 3, "the reward").tolist() == VALUES
    assert scores_of([torch.tensor(value, device="cuda") for value in VALUES], 3, "the reward").tolist() == VALUES


def test_a_masked_score_is_refused_as_what_it_is() -> None:
    masked = np.ma.masked_array(VALUES, mask=[False, True, False])
    with pytest.raises(RewardMistake, match="the reward returned a masked array, in which some scores are masked"):
        scores_of(masked, 3, "the reward")
    assert scores_of(np.ma.masked_array(VALUES), 3, "the reward").tolist() == VALUES


def test_two_numbers_in_a_tuple_are_two_scores() -> None:
    assert scores_of((1.0, 2.0), 2, "the reward").tolist() == [1, 2]


def generator() -> Any:
    yield 1.0


async def coroutine() -> None:
    """Never awaited."""


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (None, "nothing (None)"),
        (0.5, "float64 of shape ()"),
        ([0.5, 1.0], "float64 of shape (2,)"),
        (torch.ones(3, 1), "float64 of shape (3, 1)"),
        (torch.ones(3, 3), "float64 of shape (3, 3)"),
        (np.array(["a", "b", "c"]), "<U1 of shape (3,)"),
        ([None, 1.0, 2.0], "object of shape (3,)"),
        (torch.tensor([True, False, True]), "bool of shape (3,)"),
        (np.array([1j, 0, 0]), "complex128 of shape (3,)"),
        ([[1.0], [1.0, 2.0], []], "a list (setting an array element with a sequence"),
        ({"score": 1.0}, "a dict"),
        ({1.0, 2.0, 3.0}, "a set"),
        (generator(), "a generator"),
        (coroutine(), "a coroutine"),
        (torch.empty(3, device="meta"), "a Tensor (Cannot copy out of meta tensor"),
    ],
    ids=lambda answer: str(answer)[:20],
)
def test_anything_else_is_refused_with_what_it_was(answer: Any, what: str) -> None:
    with pytest.raises(RewardMistake, match=re.escape(f"the reward returned {what}")) as error:
        scores_of(answer, 3, "the reward")
    assert "for 3 images: it must return one real number for each, of shape (3,)" in str(error.value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (user_functions.two_parameters, "has the signature (images: numpy.ndarray, prompts: list[str])"),
        (lambda images: [1.0], "has the signature (images)"),
        (lambda images, prompts, metadata, extra: [1.0], "missing a required argument: 'extra'"),
        (lambda images, prompts, *, metadata: [1.0], "too many positional arguments"),
        (user_functions.not_awaited, "is async"),
        (user_functions.yields, "is a generator"),
        (user_functions.Scorer, "is the class Scorer"),
        (user_functions.NOT_A_FUNCTION, "is 3: it must be a function (images, prompts, metadata)"),
        (None, "is None"),
    ],
)
def test_what_cannot_be_called_as_a_reward_is_refused_before_it_is_called(function: Any, words: str) -> None:
    with pytest.raises(RewardMistake, match=f"^my:reward .*{re.escape(words)}"):
        check_signature(function, "my:reward")


@pytest.mark.parametrize(
    "function",
    [user_functions.scorer, lambda *arguments: [1.0], lambda a, b, c, d=1: [1.0], lambda images, *rest: [1.0], max],
)
def test_whatever_takes_three_arguments_by_position_is_accepted(function: Callable) -> None:
    check_signature(function, "my:reward")


def test_a_function_with_the_wrong_signature_is_named_by_its_path_when_it_is_loaded() -> None:
    with pytest.raises(
        RewardMistake, match=r"^reward\.path = 'tests\.user_functions:two_parameters' has the signature"
    ):
        FunctionReward(path="tests.user_functions:two_parameters").load("cpu")


def test_neither_images_nor_prompts_nor_metadata_are_changed_by_a_reward() -> None:
    def changes(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        torch.from_numpy(images).zero_()  # torch does not mind that they are read-only
        prompts[0], metadata[0]["seen"] = "", True
        return [1.0] * len(images)

    images, prompts, metadata = IMAGES.copy(), ["a", "b", "c"], [{}, {}, {}]
    under_contract(changes, "it")(images, prompts, metadata)
    assert np.array_equal(images, IMAGES) and prompts == ["a", "b", "c"] and metadata == [{}, {}, {}]


class Calls(Reward):
    """A reward whose function is given by its name in this file."""

    name: str

    def load(self, device: str) -> LoadedReward:
        return globals()[self.name]


def writes(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
    images[:] = 0
    return [1.0] * len(images)


def exits(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
    raise SystemExit(3)


def fails_in_a_library(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
    return np.stack([image[:index] for index, image in enumerate(images)])  # type: ignore[return-value]


def failure_of(function: Callable, together: bool = False) -> ScoringFailed:
    worker = RewardWorker({"mine": Calls(name=function.__name__)}, RewardPoolTable(), RuntimeTable(device="cpu"))
    batch = ImageBatch(IMAGES, tuple(map(Prompt, "abc")))
    with pytest.raises(ScoringFailed) as error:
        worker.score_together(((0, 1), (1, 3)), batch, batch) if together else worker.score(batch)
    return error.value


@pytest.mark.parametrize("together", [False, True])
def test_a_reward_that_writes_into_images_is_told_to_change_a_copy(together: bool) -> None:
    failure = failure_of(writes, together)
    assert "raised ValueError: assignment destination is read-only (images are read-only" in str(failure)
    assert "images.copy()" in str(failure) and f"{__file__}:" in str(failure)


def test_a_failure_names_error_file_line_and_function_of_the_users_own_code() -> None:
    failure = failure_of(fails_in_a_library)
    line = fails_in_a_library.__code__.co_firstlineno + 1
    assert re.search(
        rf"raised ValueError: all input arrays .* at {re.escape(__file__)}:{line}, in fails_in", str(failure)
    )
    assert "\n" not in str(failure)
    first, *_, last = failure.trace.splitlines()
    assert first == f'  File "{__file__}", line {line}, in fails_in_a_library' and last.startswith(
        "ValueError: all input"
    )


def test_a_reward_that_calls_exit_has_failed_and_ends_nobody() -> None:
    assert "raised SystemExit: 3" in str(failure_of(exits))
