"""The contract of a reward: its signature, the values it may return, and the errors if it breaks the contract."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import LoadedReward, RewardMistake
from ray_ddpo.common.clips import Pixels
from ray_ddpo.common.input_images import IMAGE, files_of, read_inputs

SIGNATURE = "(images, prompts, metadata)"
SCALARS = (int, float, np.number)
REAL = "iuf"  # numpy's kinds of real numbers; not booleans, which are a judgement and no score


def under_contract(reward: Any, who: str, with_inputs: bool = False) -> LoadedReward:
    """Wrap a loaded reward or a user's function so that both sides of the contract hold.

    The reward gets read-only copies of images, and copies of prompts and metadata, so that no reward sees another one's
    changes. Its result is converted to float32, one number an image.

    Args:
        reward: called as `reward(images, prompts, metadata)`.
        who: the reward's name in error messages.
        with_inputs: call the reward with `inputs` too: the prompts' input images, at the images' size. If its `inputs`
            have a default, they keep it for prompts without images.

    Raises:
        RewardMistake: `reward` has another signature. The wrapped reward raises it too, if a result is wrong, and
            ValueError, if an input image cannot be read.
    """
    check_signature(reward, who)
    required = with_inputs and requires_inputs(reward)

    def score(images: Pixels, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
        given = images.copy()
        given.flags.writeable = False
        given_inputs = required or (with_inputs and all(files_of(about, IMAGE) for about in metadata))
        inputs = {"inputs": read_inputs(metadata, images.shape[-3:-1])} if given_inputs else {}
        return scores_of(reward(given, list(prompts), copy.deepcopy(metadata), **inputs), len(prompts), who)

    return score


def asks_for_inputs(function: Any) -> bool:
    """Return whether a user's function has a parameter `inputs`, for the prompts' input images."""
    return "inputs" in _parameters(function)


def requires_inputs(function: Any) -> bool:
    """Return whether a user's function has a parameter `inputs` without a default, so that prompts need input images."""
    if not asks_for_inputs(function):
        return False
    return inspect.signature(function).parameters["inputs"].default is inspect.Parameter.empty


def asks_for_clips(function: Any) -> bool:
    """Return whether the first parameter of a user's function is called `clips`, in place of `images`."""
    return _parameters(function)[:1] == ("clips",)


def _parameters(function: Any) -> tuple[str, ...]:
    """Return the names of a function's parameters, in order; none if it has no signature."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # some functions written in C have no signature
        return ()


def check_signature(reward: Any, who: str) -> None:
    """Raise RewardMistake if `reward` cannot be called with images, prompts and metadata, as far as can be known.

    A function that has a parameter `inputs` must take it by name.
    """
    if isinstance(reward, type):
        raise RewardMistake(
            f"{who} is the class {reward.__name__}: it must be a function {SIGNATURE} that returns scores"
        )
    if not callable(reward):
        raise RewardMistake(f"{who} is {reward!r}: it must be a function {SIGNATURE} that returns scores")
    # An object's kind of function is that of its `__call__`.
    called = reward if inspect.isroutine(reward) else getattr(reward, "__call__", reward)  # noqa: B004
    if inspect.iscoroutinefunction(called):
        raise RewardMistake(
            f"{who} is async: it must be a plain function {SIGNATURE}; call asyncio.run(…) inside of it"
        )
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise RewardMistake(f"{who} is a generator, because it has a yield: it must return all scores at once")
    try:
        signature = inspect.signature(reward)
    except (ValueError, TypeError):  # some functions written in C have no signature: the first call shows
        return
    try:
        signature.bind(None, None, None, **({"inputs": None} if asks_for_inputs(reward) else {}))
    except TypeError as error:
        raise RewardMistake(
            f"{who} has the signature {signature}: it is called with three arguments by position, {SIGNATURE}; {error}"
        ) from error


def scores_of(answer: Any, count: int, who: str) -> Float[np.ndarray, "B"]:
    """Convert a reward's result to float32, one number an image.

    Accepted: an array or tensor of shape [count], of any real type, on any device, with or without gradient; a list of
    numbers or of tensors without axes; and TRL's tuple (scores, metadata), whose metadata is ignored.

    Raises:
        RewardMistake: the result is something else. Shape [count, 1] is refused too, because for a single image it
            could as well be a matrix of images and prompts.
    """
    answer = _without_metadata(answer)
    if np.ma.isMaskedArray(answer) and np.ma.is_masked(answer):
        raise RewardMistake(_refusal(who, "a masked array, in which some scores are masked,", count))
    try:
        values = _array(answer)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RewardMistake(_refusal(who, f"a {type(answer).__name__} ({error})", count)) from error
    if values.shape != (count,) or values.dtype.kind not in REAL:
        raise RewardMistake(_refusal(who, _described(answer, values), count))
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which is not accepted as a score
        return values.astype(np.float32)


def _refusal(who: str, what: str, count: int) -> str:
    return f"{who} returned {what} for {count} images: it must return one real number for each, of shape ({count},)"


def _without_metadata(answer: Any) -> Any:
    """Return the scores of TRL's (scores, metadata). A tuple of two numbers is scores, and stays."""
    if (
        isinstance(answer, tuple)
        and len(answer) == 2
        and not isinstance(answer[0], SCALARS)
        and _is_metadata(answer[1])
    ):
        return answer[0]
    return answer


def _is_metadata(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return value is None or isinstance(value, Mapping) or (listed and all(isinstance(each, Mapping) for each in value))


def _array(answer: Any) -> np.ndarray:
    if isinstance(answer, torch.Tensor):
        return _of_tensor(answer)
    if isinstance(answer, list | tuple):
        answer = [_of_tensor(each) if isinstance(each, torch.Tensor) else each for each in answer]
    return np.asarray(answer)


def _of_tensor(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.is_floating_point():  # numpy has no bfloat16
        tensor = tensor.double()
    return tensor.cpu().numpy()


def _described(answer: Any, values: np.ndarray) -> str:
    if inspect.iscoroutine(answer):
        answer.close()  # or Python warns that it was never awaited
    if answer is None:
        return "nothing (None)"
    if values.dtype == object and values.shape == ():
        return f"a {type(answer).__name__}"
    return f"{values.dtype} of shape {values.shape}"
