"""Seeds of a whole round at once are those that numpy gives one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.image_seeds import hashed_words
from common.schedule import Stream, image_seed, image_seeds


@given(st.lists(st.integers(0, 2**70), max_size=6), st.integers(1, 20))
def test_every_word_is_numpys(entropy: list[int], count: int) -> None:
    expected = [np.random.SeedSequence([*entropy, last]).generate_state(1, np.uint64)[0] for last in range(count)]
    assert hashed_words(entropy, count).tolist() == expected


@given(st.integers(0, 2**64), st.sampled_from(Stream), st.integers(0, 10**6), st.integers(0, 30))
def test_a_rounds_seeds_are_those_of_its_images(run_seed: int, stream: Stream, round: int, count: int) -> None:
    assert image_seeds(run_seed, stream, round, count) == [
        image_seed(run_seed, stream, round, image) for image in range(count)
    ]


def test_a_late_image_has_its_own_too() -> None:
    assert image_seeds(7, Stream.TRAINING, 3, 70_000)[-1] == image_seed(7, Stream.TRAINING, 3, 69_999)
