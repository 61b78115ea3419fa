"""Micro-batches: what is cut of an optimizer step's pairs, in order."""

from learner.round_pairs import micro_batches


def test_micro_batches_are_cut_in_order() -> None:
    pairs = [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert list(micro_batches(pairs, 2)) == [pairs[:2], pairs[2:]]


def test_what_is_left_over_makes_a_smaller_last_micro_batch() -> None:
    pairs = [(0, 0), (1, 0), (0, 1)]
    assert list(micro_batches(pairs, 2)) == [pairs[:2], pairs[2:]]
    assert list(micro_batches([], 2)) == []
