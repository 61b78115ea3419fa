"""The interface of differentiable rewards: what the learner calls to propagate a reward's gradient into the images."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

# Images in float32 from 0 to 1 with gradients, prompts and metadata → one number an image.
DifferentiableReward = Callable[[Float[Tensor, "B 3 H W"], list[str], list[dict[str, Any]]], Float[Tensor, "B"]]


@runtime_checkable
class HasGradient(Protocol):
    """A reward that the learner can load in its own process."""

    @property
    def memory_bytes(self) -> int: ...

    @property
    def users_code(self) -> str | None: ...

    def load_differentiable(self, device: str) -> DifferentiableReward: ...


class _StraightThrough(torch.autograd.Function):
    """The second input, to the bit, with the gradient of the first."""

    @staticmethod
    def forward(_: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, with the gradient of `values` (straight-through estimator, Bengio et al. 2013)."""
    return _StraightThrough.apply(values, rounded.detach())  # type: ignore[return-value]


def grey_levels_with_gradient(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Return the levels 0 … 255 that an image file would have. Rounding has the gradient of the identity."""
    levels = 255 * pixels
    return straight_through(levels, levels.round())


def weighted_sum(
    rewards: dict[str, tuple[float, DifferentiableReward]],
    pixels: Float[Tensor, "B 3 H W"],
    prompts: tuple[str, ...],
    metadata: tuple[dict[str, Any], ...],
) -> Float[Tensor, "B"]:
    """Return Σ weight · reward of each image, in float32 or more.

    Raises:
        ValueError: a reward returns no number with a gradient for each image.
    """
    total = torch.zeros(len(prompts), device=pixels.device)
    for name, (weight, reward) in rewards.items():
        values = reward(pixels, list(prompts), [dict(each) for each in metadata])
        check_scores(f"the reward {name!r}", values, len(prompts), pixels.requires_grad)
        total = total + weight * values
    return total


def check_scores(who: str, values: Any, count: int, wants_gradient: bool) -> None:
    """Check what a differentiable reward returned.

    Args:
        who: the reward in the error.
        values: what it returned.
        count: the number of images.
        wants_gradient: the images have gradients.

    Raises:
        ValueError: it is no number with a gradient for each image.
    """
    expected = expected_scores(count)
    if not isinstance(values, Tensor):
        raise ValueError(f"{who} returned {type(values).__name__}: expected {expected}")
    if tuple(values.shape) != (count,) or not values.is_floating_point():
        raise ValueError(f"{who} returned {values.dtype} of shape {tuple(values.shape)}: expected {expected}")
    if wants_gradient and torch.is_grad_enabled() and not values.requires_grad:
        raise ValueError(f"{who} returned numbers without a gradient: expected {expected}; {NO_DETACH}")


def expected_scores(count: int) -> str:
    """Return in words what a differentiable reward returns for this many images."""
    return f"a tensor of shape ({count},) of finite floating numbers with a gradient with respect to the images"


NO_DETACH = "no detach(), item(), numpy() or torch.no_grad() may stand between images and scores"
