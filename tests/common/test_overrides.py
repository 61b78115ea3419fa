"""Overrides of the command line: what a value is read as, where it lands, and what is refused."""

from typing import Any

import pytest

from ray_ddpo.common.recipe import overrides
from ray_ddpo.common.recipe.overrides import with_overrides
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.registries import REGISTRIES

TABLES = {
    "name": "demo",
    "policy": {"name": "stable_diffusion", "lora": {"rank": 4}},
    "prompts": {"name": "file"},
    "reward": {"name": "function"},
    "algorithm": {"name": "ddpo_is"},
    "trackers": [{"name": "jsonl"}, {"name": "wandb"}],
}


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


def test_overrides_leave_the_given_tables_unchanged() -> None:
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


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("name", "true", "true"),
        ("name", '"true"', "true"),
        ("name", "2024-01-01", "2024-01-01"),
        ("output_dir", "7", "7"),
        ("rounds", "7", 7),
        ("rounds", "true", True),  # what no type accepts is refused as it was meant
        ("learner.learning_rate", "1e-3", 1e-3),
        ("learner.learning_rate", "nan", pytest.approx(float("nan"), nan_ok=True)),
        ("learner.micro_batch_size", "auto", "auto"),
        ("learner.micro_batch_size", "8", 8),
        ("push.revision", "1.5", "1.5"),
        ("prompts.name", "45", "45"),
        ("prompts.path", "45", "45"),
        ("prompts.images_per_prompt", "45", 45),
        ("policy.model", "1e5", "1e5"),
        ("policy.lora.rank", "8", 8),
        ("policy.lora.target_modules", '["to_q"]', ["to_q"]),
        ("reward.label", "7", "7"),
        ("reward.path", "7", "7"),
        ("reward.weight", "7", 7),
        ("reward.workers.batch_size", "7", 7),
        ("algorithm.clip_range", "1e-4", 1e-4),
        ("trackers.1.project", "2024", "2024"),
        ("evaluation.prompts", '["true", "1"]', ["true", "1"]),
        ("guard.best_by", "1", "1"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_key(
    key: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overrides, "REGISTRIES", REGISTRIES)
    found: Any = with_overrides(TABLES, [f"--{key}", text], Recipe)
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    assert found == value and type(found) is type(value) or not isinstance(value, (bool, int, float, str, list))


def test_a_components_name_may_come_after_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrides, "REGISTRIES", REGISTRIES)
    words = [
        "--trackers.0.project",
        "2024",
        "--trackers.0.name",
        "wandb",
        "--reward.path",
        "1",
        "--reward.name",
        "none",
    ]
    found = with_overrides(TABLES, words, Recipe)
    assert found["trackers"][0] == {"project": "2024", "name": "wandb"}
    assert found["reward"] == {"name": "none", "path": 1}  # of a class that is not there: as TOML
