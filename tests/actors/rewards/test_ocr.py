"""The ocr reward reads rendered words, and scores them as Flow-GRPO does."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.rendered_truth import word_image
from ray_ddpo.actors.rewards.ocr import (
    Ocr,
    enlarged,
    is_same,
    load_readers,
    read_all,
    right_share,
    target,
    without_margins,
)
from ray_ddpo.common.prompts import Prompt


def signs(*texts: str, side: int = 128) -> np.ndarray:
    return np.stack([word_image(text, side, np.random.default_rng(3)) for text in texts])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a sign that says "CAT"', "cat"),
        ('"Hello World" in the sky', "helloworld"),
        ('"one" and "two"', "one"),  # the first, as in the authors' code
        ('a 6" pipe', None),
        ('empty ""', None),
        ('blank "  "', None),
        ("a cat", None),
    ],
)
def test_the_target_is_the_first_quoted_words(prompt: str, words: str | None) -> None:
    if words is None:
        with pytest.raises(ValueError, match="has no words in double quotes"):
            target(prompt)
    else:
        assert target(prompt) == words


@pytest.mark.parametrize(
    ("text", "wanted", "score"),
    [
        ("CAT", "cat", 1),
        ("Hello World", "helloworld", 1),
        ("the cat sat", "cat", 1),  # contained
        ("cut", "cat", 2 / 3),  # one substitution of three letters
        ("ca", "cat", 2 / 3),
        ("", "cat", 0),
        ("completely different", "cat", 0),  # not below 0
        ("helo wrld", "helloworld", 0.8),
    ],
)
def test_the_partial_score_is_one_minus_the_share_of_wrong_letters(text: str, wanted: str, score: float) -> None:
    assert right_share(text, wanted) == pytest.approx(score)


def test_the_edit_distance_is_that_of_the_textbook() -> None:
    """Wagner and Fischer 1974, written out."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        text, wanted = ("".join(generator.choice(list("abc"), generator.integers(1, 9))) for _ in range(2))
        row = list(range(len(wanted) + 1))
        for i, letter in enumerate(text, 1):
            row, above = [i], row
            for j, other in enumerate(wanted, 1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        expected = 1.0 if wanted in text else 1 - min(row[-1], len(wanted)) / len(wanted)
        assert right_share(text, wanted) == pytest.approx(expected)


def test_the_strict_score_needs_the_text_and_nothing_else() -> None:
    assert [is_same(text, "cat") for text in ("C A T", "cats", "")] == [1, 0, 0]


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("side", [64, 200])
def test_rendered_words_are_read_at_every_size(side: int) -> None:
    images = signs("OPEN", "Coffee", "Hello World", side=side)
    prompts = [f'a sign "{word}"' for word in ("open", "COFFEE", "hello world")]
    for measure in ("partial", "strict"):
        assert Ocr(measure=measure).load("cpu")(images, prompts, [{}] * 3).tolist() == [1, 1, 1]
    assert Ocr().load("cpu")(images[[0]], ['"opel"'], [{}]).tolist() == [0.75]


def test_an_image_without_text_scores_zero() -> None:
    images = np.full((2, 64, 64, 3), 200, np.uint8)
    images[1] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    assert Ocr().load("cpu")(images, ['"cat"'] * 2, [{}] * 2).tolist() == [0, 0]


def test_the_number_of_readers_changes_no_text() -> None:
    images = signs("OPEN", "Bakery", "SALE", "Winter", "EXIT")
    (reader,) = load_readers("cpu", 192, 0.5)[:1]
    one = read_all([reader], images)
    several = read_all(load_readers("cpu", 192, 0.5) + [reader], images)
    assert one == several == ["OPEN", "Bakery", "SALE", "Winter", "EXIT"]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, (192, 192)), (64, 128, (192, 384)), (3, 500, (192, 768)), (900, 3, (900, 225)), (64, 256, (192, 768))],
)
def test_a_small_image_is_enlarged_and_an_elongated_one_padded(height: int, width: int, size: tuple[int, int]) -> None:
    assert enlarged(np.zeros((height, width, 3), np.uint8), 192).shape[:2] == size


def test_prompts_are_checked_before_anything_is_sampled() -> None:
    Ocr().check_prompts([Prompt('a "cat"')])
    with pytest.raises(ValueError, match="prompt 'a dog' has no words in double quotes"):
        Ocr().check_prompts([Prompt('a "cat"'), Prompt("a dog")])


def test_quotes_that_are_not_closed_are_refused() -> None:
    with pytest.raises(ValueError, match="has 3 double quotes, so that it is not clear which words are quoted"):
        Ocr().check_prompts([Prompt('a 27" screen that says "HELLO"')])


def test_letters_that_the_recognizer_does_not_know_are_refused() -> None:
    Ocr().check_prompts([Prompt('a sign that says "CAFÉ Größe ½ 日本"')])
    with pytest.raises(ValueError, match="has the letters вет in its quoted words, which the recognizer does not know"):
        Ocr().check_prompts([Prompt('a sign that says "CAT"'), Prompt('a sign that says "ВЕТ"')])
    with pytest.raises(ValueError) as error:
        target("dogs " * 5000)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("side", [64, 200])
def test_a_single_line_is_read_without_detection(side: int) -> None:
    words = ("OPEN", "Coffee", "SALE")
    images = signs(*words, side=side)
    reward = Ocr(measure="strict", detect=False).load("cpu")
    assert reward(images, [f'"{word}"' for word in words], [{}] * 3).tolist() == [1, 1, 1]
    images[1] = np.random.default_rng(0).integers(0, 256, images[1].shape)
    images[2] = 200
    assert reward(images, [f'"{word}"' for word in words], [{}] * 3).tolist() == [1, 0, 0]


def test_plain_rows_above_and_below_a_line_are_cut_but_for_a_margin() -> None:
    image = np.full((60, 40, 3), 250, np.uint8)
    image[20:30, 5:35] = 10
    assert without_margins(image).tolist() == image[18:32].tolist()
    assert without_margins(image[:10]).tolist() == image[:10].tolist()


def test_full_width_letters_are_the_plain_ones() -> None:
    assert is_same("ＣLＵB", "club") == 1


def test_the_plan_counts_the_files_of_one_recognizer() -> None:
    import rapidocr

    files = Path(rapidocr.__file__).parent / "models"
    used = [file.stat().st_size for file in files.glob("PP-OCRv6_*_small.onnx")]
    assert len(used) == 2 and Ocr().memory_bytes == sum(used)
