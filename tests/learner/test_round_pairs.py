"""Micro-batches: what is cut of an optimizer step's indices, in order."""

import numpy as np

from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.round_data.transitions_index import TrainingItems, TransitionIndex, micro_batches
from tests.accepted_page import assert_accepted


def test_micro_batches_are_cut_in_order() -> None:
    indices = [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert list(micro_batches(indices, 2)) == [indices[:2], indices[2:]]


def test_what_is_left_over_makes_a_smaller_last_micro_batch() -> None:
    indices = [(0, 0), (1, 0), (0, 1)]
    assert list(micro_batches(indices, 2)) == [indices[:2], indices[2:]]
    assert list(micro_batches([], 2)) == []


def test_a_remainder_joins_the_last_optimizer_step() -> None:
    assert_accepted("`rwr_sparse` with a remainder")

    def sizes(images: int) -> list[int]:
        return [len(step) for step in Items().optimizer_steps(np.arange(images), 4, ())]

    assert [sizes(images) for images in (0, 3, 4, 5, 8, 9, 11)] == [[], [3], [4], [5], [4, 4], [4, 5], [4, 7]]
    order = np.array([7, 3, 1, 8, 2])
    assert [image for image, _ in Items().optimizer_steps(order, 2, (1,))[-1]] == [8, 2]


class Items(TrainingItems):
    """One item an image."""

    @property
    def num_images(self) -> int:
        return 12

    def positions(self, inner_epoch: int) -> range:
        return range(1)

    def batch(self, indices: list[TransitionIndex]) -> TransitionBatch | NoisedBatch:
        raise AssertionError("nothing is learned here")
