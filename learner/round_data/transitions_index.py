"""Indices of a round's training items: which of them make an optimizer step, cut into micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch

# An `(image, step)` index: an image of the round, and a position among its trained steps or its noised samples.
TransitionIndex = tuple[int, int]


class TrainingItems(ABC):
    """The training items of a round (transitions, or noised samples), by `(image, step)` index."""

    @property
    @abstractmethod
    def num_images(self) -> int:
        """The number of images of the round, or of its part."""

    @abstractmethod
    def positions(self, inner_epoch: int) -> range:
        """Return the second numbers of every image's indices in an inner epoch.

        If two inner epochs have the same positions, they train on the same items.
        """

    @abstractmethod
    def batch(self, indices: list[TransitionIndex]) -> TransitionBatch | NoisedBatch:
        """Return the items at these indices on the device, one row each."""

    def indices_of(self, images: np.ndarray, inner_epoch: int = 0) -> list[TransitionIndex]:
        """Return all indices of these images in an inner epoch, position by position."""
        return [(int(image), position) for position in self.positions(inner_epoch) for image in images]

    def optimizer_steps(
        self, order: np.ndarray, size: int, dropped: tuple[int, ...], inner_epoch: int = 0
    ) -> list[list[TransitionIndex]]:
        """Return the indices of each optimizer step: of `size` images in `order`, without dropped images.

        A dropped image does not move another one to a different step. A remainder of fewer than `size` images joins the
        last full step: a few images alone would otherwise make a full step.
        """
        cut = np.split(order, range(size, len(order) - size + 1, size)) if len(order) else []
        return [self.indices_of(images[~np.isin(images, dropped)], inner_epoch) for images in cut]


def micro_batches(indices: list[TransitionIndex], size: int) -> Iterator[list[TransitionIndex]]:
    """Cut `indices` into micro-batches of `size`; the last is smaller only if images of the step are dropped."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def share_of(indices: list[TransitionIndex], rank: int, world_size: int) -> list[TransitionIndex]:
    """Return a rank's share of an optimizer step: all items of every `world_size`-th image.

    All ranks have equally many images, unless images are dropped and `world_size` does not divide the rest. Then some
    ranks have one more.
    """
    if world_size == 1:
        return indices
    own = set(list(dict.fromkeys(image for image, _ in indices))[rank::world_size])
    return [index for index in indices if index[0] in own]
