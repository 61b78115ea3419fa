"""Scores are read from clear answers only: values by hand, and answers that must not be scored."""

import math

import pytest

from ray_ddpo.actors.rewards.judging.answers import (
    UnreadableAnswer,
    read_json_number,
    read_number,
    read_yes_or_no,
    yes_probability,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        (" 7.5\n", 7.5),
        ("7/10", 7),
        ("8 out of 10.", 8),
        ("Score: 7", 7),
        ("**Final score:** 7", 7),
        ("Overall rating is 3", 3),
        (".5", 0.5),
        ("0", 0),
        ("10", 10),
        ("(7)", 7),
    ],
)
def test_a_number_alone_is_read(text: str, number: float) -> None:
    assert read_number(text, 0.0, 10.0) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seven",
        "There are 3 dogs",
        "I give it 7",
        "7 or 8",
        "7 8",
        "-3",
        "Score: -3",
        "11",
        "3/5",
        "5%",
        "7,5",
        "1e1",
        "nan",
        "Score: inf",
        "x7",
        "7x",
        "\N{MINUS SIGN}7",
        "<5",
        "~7",
        "Score: Score: 7 because of 2 dogs",
    ],
)
def test_anything_else_is_no_number(text: str) -> None:
    with pytest.raises(UnreadableAnswer):
        read_number(text, 0.0, 10.0)


def test_a_pattern_finds_the_number_inside_of_text_and_must_find_one_only() -> None:
    pattern = r"Final Score:\s*([0-9.]+)"
    assert read_number("dog (animal): 1\nFinal Score: 4", 1.0, 5.0, pattern) == 4
    assert read_number("Final Score: 4 … as I said, Final Score: 4", 1.0, 5.0, pattern) == 4
    for text in ("The score is 4", "Final Score: 4\nFinal Score: 2", "Final Score: 40", "Final Score: 1.2.3"):
        with pytest.raises(UnreadableAnswer):
            read_number(text, 1.0, 5.0, pattern)


def test_a_number_in_a_json_object_is_read() -> None:
    assert read_json_number('{"score": 4, "why": "two dogs"}', "score", 0.0, 10.0) == 4
    assert read_json_number('```json\n{"score": 4.5}\n```', "score", 0.0, 10.0) == 4.5
    assert read_json_number('Here it is:\n```\n{"a": 0}\n```', "a", 0.0, 10.0) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "[4]",
        '{"score": "4"}',
        '{"score": true}',
        '{"score": null}',
        '{"score": NaN}',
        '{"score": 1e999}',
        '{"score": 11}',
        '{"score": -1}',
        '{"rating": 4}',
        '{"score": 4',
        '{"score": 3, "score": 9}',
        '{"score": 4} and {"score": 5}',
        '```{"score": 4}``` ```{"score": 5}```',
        "[" * 100_000,
        '{"score": 1' + "0" * 400 + "}",
    ],
)
def test_anything_else_is_no_json_number(text: str) -> None:
    with pytest.raises(UnreadableAnswer):
        read_json_number(text, "score", 0.0, 10.0)


def test_yes_and_no_are_read_if_the_answer_begins_with_one_and_has_not_both() -> None:
    assert [read_yes_or_no(text) for text in ("Yes", "yes.", '"YES"', "Yes, it shows a cat.")] == [1, 1, 1, 1]
    assert [read_yes_or_no(text) for text in ("No", "no, it is a dog")] == [0, 0]
    for text in ("", "It does: yes", "Yes and no", "No. Wait, yes!", "Nothing", "yesterday", "maybe"):
        with pytest.raises(UnreadableAnswer):
            read_yes_or_no(text)


def test_the_probability_of_yes_is_its_share_of_both_words() -> None:
    # P(yes) = .5 + .1 in two spellings, P(no) = .2: .6 / .8
    candidates = (("Yes", math.log(0.5)), (" no", math.log(0.2)), ("▁YES", math.log(0.1)), ("The", math.log(0.1)))
    assert yes_probability(candidates) == pytest.approx(0.75)
    assert yes_probability((("No", 0.0),)) == 0


@pytest.mark.parametrize(
    "candidates",
    [
        (),
        (("The", -0.1), ("Yes", -3.0), ("no", -3.5)),
        (("yes", -9999.0),),
        *((("yes", log_prob), ("no", -1.0)) for log_prob in (1000.0, math.inf, math.nan)),
    ],
)
def test_other_words_than_yes_and_no_are_no_score(candidates: tuple[tuple[str, float], ...]) -> None:
    with pytest.raises(UnreadableAnswer):
        yes_probability(candidates)
