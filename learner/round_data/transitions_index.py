"""A round's (image, place) pairs, whatever a place is: which of them make an optimizer step, cut into micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch

TransitionIndex = tuple[
    int, int
]  # an image of the round, and a place: among its kept steps, or among its noised_samples


class TrainingItems(ABC):
    """Gives pairs to learn from, and their tensors on the device."""

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Of the round, or of its part."""

    @abstractmethod
    def places(self, inner_epoch: int) -> range:
        """Those of every image in an inner epoch. The same in each: its pairs come again."""

    @abstractmethod
    def batch(self, pairs: list[TransitionIndex]) -> TransitionBatch | NoisedBatch:
        """These pairs, a row each, on the device."""

    def pairs_of(self, images: np.ndarray, inner_epoch: int = 0) -> list[TransitionIndex]:
        """Every pair of these images in an inner epoch, place by place."""
        return [(int(image), place) for place in self.places(inner_epoch) for image in images]

    def optimizer_steps(
        self, order: np.ndarray, size: int, dropped: tuple[int, ...], inner_epoch: int = 0
    ) -> list[list[TransitionIndex]]:
        """The pairs of each optimizer step: `size` images in `order`, without those dropped, which move no other.

        If fewer are left over at the end, they join the step before: a few images would else make a whole step.
        """
        cut = np.split(order, range(size, len(order) - size + 1, size)) if len(order) else []
        return [self.pairs_of(images[~np.isin(images, dropped)], inner_epoch) for images in cut]


def micro_batches(pairs: list[TransitionIndex], size: int) -> Iterator[list[TransitionIndex]]:
    """Cut `pairs` into batches of `size`; the last is smaller only where images of the optimizer step are left out."""
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def share_of(pairs: list[TransitionIndex], rank: int, count: int) -> list[TransitionIndex]:
    """A rank's part of an optimizer step's pairs: every `count`-th of its images with all of their places.

    Equal parts, but where images are left out and `count` does not divide those that stay: then some ranks have one more.
    """
    if count == 1:
        return pairs
    own = set(list(dict.fromkeys(image for image, _ in pairs))[rank::count])
    return [pair for pair in pairs if pair[0] in own]
