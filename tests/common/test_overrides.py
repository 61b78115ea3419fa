"""Overrides of the command line: what a value is read as, where it lands, and what is refused."""

import pytest

from common.overrides import with_overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("cuda", "cuda"),
        ('"7"', "7"),
        ("a photo of a cat", "a photo of a cat"),
        ("s3://bucket/runs", "s3://bucket/runs"),
        ('["a", "b"]', ["a", "b"]),
        ("{rank = 4}", {"rank": 4}),
        ("", ""),
        ("1\nrounds = 9", "1\nrounds = 9"),
    ],
)
def test_a_value_is_read_as_toml_and_else_as_text(text: str, value: object) -> None:
    assert with_overrides({}, ["--section.key", text]) == {"section": {"key": value}}


def test_overrides_leave_the_tables_they_are_laid_over_as_they_were() -> None:
    tables = {"learner": {"batch_size": 4}, "trackers": [{"name": "jsonl"}]}
    with_overrides(tables, ["--learner.batch_size", "8", "--trackers.0.name", "wandb"])
    assert tables == {"learner": {"batch_size": 4}, "trackers": [{"name": "jsonl"}]}


@pytest.mark.parametrize("options", [["--rounds"], ["rounds", "6"], ["--rounds", "6", "--seed"]])
def test_overrides_that_are_no_pairs_are_shown(options: list[str]) -> None:
    with pytest.raises(ValueError, match="overrides are pairs of --section.key and VALUE, and these are"):
        with_overrides({}, options)


@pytest.mark.parametrize("option", ["--trackers.2.project", "--trackers.x.project", "--trackers.0"])
def test_a_position_that_a_list_does_not_have_is_named(option: str) -> None:
    with pytest.raises(ValueError, match=f"an override says '.*{option.rpartition('.')[2]}' of a list of 2 tables"):
        with_overrides({"trackers": [{"name": "jsonl"}, {"name": "wandb"}]}, [option, "x"])


def test_a_key_inside_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="an override names the key 'x' inside 6, which is a value and not a table"):
        with_overrides({"rounds": 6}, ["--rounds.x", "1"])
