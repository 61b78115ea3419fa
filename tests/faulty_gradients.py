"""Differentiable rewards as a user would write them, right and wrong."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_ddpo.actors.rewards.reward import LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward

FACTOR = nn.Parameter(torch.ones(()))


def redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def flat_when_dark(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.relu(images.mean(dim=(1, 2, 3)) - 0.75)


def through_numpy(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.from_numpy(images.numpy().mean((1, 2, 3)))


def in_place(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.sub_(0.5).mean((1, 2, 3))


def detached(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.detach().mean((1, 2, 3))


def array(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    return images.detach().numpy().mean((1, 2, 3))


def listed(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return images.detach().mean((1, 2, 3)).tolist()


def column(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3)).unsqueeze(1)


def infinite(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3)) / 0


def infinite_slope(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return (images - images.detach()).abs().mean((1, 2, 3)).sqrt()


def of_parameter(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.detach().mean((1, 2, 3)) * FACTOR


def rounded(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.round().mean((1, 2, 3))


def infinite_slope_of_two(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Return redness, whose gradient is infinite for batches of two images."""
    scores = redness(images, prompts, metadata)
    return scores + (scores - scores.detach()).sqrt() if len(images) == 2 else scores


class OwnRedness(Reward):
    """A reward whose differentiable function returns something else."""

    def load(self, device: str) -> LoadedReward:
        return lambda images, prompts, metadata: images[..., 0].mean(axis=(1, 2), dtype="float32") / 255

    def load_differentiable(self, device: str) -> DifferentiableReward:
        return lambda pixels, prompts, metadata: pixels.mean((2, 3))


class OwnUnloadable(OwnRedness):
    """A reward that raises while the learner loads it."""

    def load_differentiable(self, device: str) -> DifferentiableReward:
        raise KeyError("weights")
