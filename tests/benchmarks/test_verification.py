"""The page of verification levels is generated, complete, and claims no more than its data."""

import re

import pytest

from benchmarks.verification import DATA, LEVELS, PAGE, RECIPES, page, subjects, verifications
from ray_ddpo.common.diffusion import POLICIES

ENTRY = {"covers": ["family sdxl"], "level": "tiny", "run": "r", "date": "d", "commit": "c", "command": "make RECIPE"}
PLAN = {"run": "planned", "date": "d", "commit": "c"}


def test_the_page_is_the_one_that_its_data_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make verification`"


def test_every_recipe_and_family_has_one_row_with_a_known_level() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", page(), flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(subject.split()[1] for subject in subjects())
    assert {level for _, level in rows} <= LEVELS.keys()
    assert len(list(RECIPES.rglob("*.toml"))) + len(POLICIES) == len(rows)


def test_a_subject_without_an_entry_is_planned_only() -> None:
    rows = {row.name: row for row in verifications({"plan": PLAN, "entry": [ENTRY]})}
    assert (rows["sdxl"].level, rows["sdxl"].command) == ("tiny", "make sdxl")
    assert (rows["sd15_aesthetic"].level, rows["sd15_aesthetic"].run) == ("plan", "planned")


@pytest.mark.parametrize("change", [{"covers": ["family sdxxl"]}, {"level": "complete"}])
def test_an_unknown_name_or_level_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="sdxxl|complete"):
        verifications({"plan": PLAN, "entry": [ENTRY | change]})


def test_every_entry_names_a_commit_and_a_command() -> None:
    text = DATA.read_text(encoding="utf-8")
    assert len(re.findall(r'^commit = "[0-9a-f]{7}"$', text, flags=re.MULTILINE)) == text.count("[[entry]]") + 1
    assert text.count("\ncommand = ") == text.count("[[entry]]")
