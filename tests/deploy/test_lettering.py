"""Prompts in report images: readable if a font has their letters, else a number; never boxes."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from ray_ddpo.deploy.commands.report.images import in_two_lines, lettering, rows_image
from tests.accepted_page import assert_accepted

PROMPTS = ["Füchschen", "кот\nдва", "猫が好き", "قطة حمراء", "🦊🏽 fox", "costs $5 or $\\frac$", "\U000f0000 nobody's"]


def letters(family: str) -> set[int]:
    return set(FT2Font(font_manager.findfont(family)).get_charmap())


def test_every_letter_that_is_written_is_in_a_font_and_the_others_have_a_number(tmp_path: Path) -> None:
    written = lettering(PROMPTS)
    there = set.union(*map(letters, written.families))
    for index, (text, number, prompt) in enumerate(zip(written.texts, written.numbers, PROMPTS, strict=True), start=1):
        assert text == (number or " ".join(prompt.split())) and number in ("", f"#{index}")
        assert {ord(letter) for letter in text if letter != " "} <= there
    assert written.texts[0] == "Füchschen" and written.texts[1] == "кот два" and written.texts[6] == "#7"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each letter that it draws as a box
        images = [np.zeros((24, 16, 3), np.uint8)] * len(PROMPTS)
        rows_image([("runs/a $\\b", images, "black")], tmp_path / "rows.png", PROMPTS)
    assert (tmp_path / "rows.png").stat().st_size > 5000
    assert_accepted("Chinese, Arabic, emoji in `before_after.png`")


def test_another_font_of_the_machine_is_taken_for_what_the_usual_one_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {entry.name: entry for entry in font_manager.fontManager.ttflist if entry.style == "normal"}
    usual, other = entries["DejaVu Sans"], entries["STIXGeneral"]
    only_there = min(letters(other.name) - letters(usual.name))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [usual, other])
    written = lettering([f"a {chr(only_there)}", "a cat"])
    assert written.texts == (f"a {chr(only_there)}", "a cat") and written.families == ("DejaVu Sans", "STIXGeneral")


def test_letters_that_must_be_joined_are_left_out_where_matplotlib_does_not_join_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("matplotlib.__version_info__", (3, 10, 0))
    assert lettering(["قطة", "a cat"]).texts == ("#1", "a cat")


def test_the_end_of_a_prompt_of_two_lines_is_written() -> None:
    assert in_two_lines('a sign that says "BY"') == 'a sign that says\n"BY"'
    assert in_two_lines("a cat") == "a cat"
    assert in_two_lines("one two three four five six seven eight nine ten") == "one two three four\nfive six seven…"
