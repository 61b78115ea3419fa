"""The cache: an image is scored once, a changed one again, and the oldest is forgotten."""

from typing import Any

import numpy as np

from ray_ddpo.actors.rewards.score_cache import ScoreCache

SEEN: list[list[float]] = []
IMAGES = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (10, 20, 30)])


def brightness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    SEEN.append([float(image.mean()) for image in images])
    return np.array([image.mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)], np.float32)


def ask(cache: ScoreCache, rows: list[int], prompt: str = "a", **metadata: int) -> list[float]:
    SEEN.clear()
    return cache(IMAGES[rows], [prompt] * len(rows), [metadata] * len(rows)).tolist()


def test_only_what_is_new_is_scored() -> None:
    cache = ScoreCache(brightness, 8)
    assert ask(cache, [0, 1]) == [11, 21] and SEEN == [[10, 20]]
    assert ask(cache, [2, 1, 0]) == [31, 21, 11] and SEEN == [[30]]
    assert ask(cache, [1, 2]) == [21, 31] and SEEN == []


def test_the_same_image_for_another_prompt_or_other_metadata_is_new() -> None:
    cache = ScoreCache(brightness, 8)
    ask(cache, [0])
    assert ask(cache, [0], "abc") == [13] and SEEN == [[10]]
    ask(cache, [0], weight=1)
    assert SEEN == [[10]]


def test_what_was_asked_for_longest_ago_is_forgotten_first() -> None:
    cache = ScoreCache(brightness, 2)
    ask(cache, [0, 1])
    ask(cache, [0])
    ask(cache, [2])
    assert ask(cache, [0, 2, 1]) == [11, 31, 21] and SEEN == [[20]]


def test_a_score_that_is_not_finite_is_asked_for_again() -> None:
    answers = [np.array([np.nan, 1.0], np.float32), np.array([5.0], np.float32)]
    cache = ScoreCache(lambda images, prompts, metadata: answers.pop(0), 8)
    assert np.isnan(ask(cache, [0, 1])[0])
    assert ask(cache, [0, 1]) == [5, 1]


def test_an_answer_of_the_wrong_shape_reaches_the_worker_as_it_is() -> None:
    wrong = np.zeros((2, 1), np.float32)
    assert ScoreCache(lambda images, prompts, metadata: wrong, 8)(IMAGES[:2], ["a"] * 2, [{}] * 2) is wrong


def test_one_image_twice_in_a_batch_has_its_score_twice() -> None:
    assert ask(ScoreCache(brightness, 8), [1, 1]) == [21, 21]
