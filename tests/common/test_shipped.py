"""A recipe is found by its path or by the name of a shipped one, from any folder."""

from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.shipped import RECIPES, near_recipes, shipped_recipes


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shipped_recipes_are_found_by_name_from_any_folder() -> None:
    assert {"demo", "sd15_aesthetic", "tiny/grpo", "families/sdxl_full"} <= shipped_recipes().keys()
    assert len(shipped_recipes()) == len(list(RECIPES.rglob("*.toml")))
    assert Recipe.load("demo").name == "demo" and Recipe.load("tiny/grpo", ["--rounds", "3"]).rounds == 3


def test_a_file_of_that_name_comes_before_a_shipped_recipe(elsewhere: Path) -> None:
    (elsewhere / "demo").write_text((RECIPES / "demo.toml").read_text().replace('name = "demo"', 'name = "mine"'))
    assert Recipe.load("demo").name == "mine"


def test_a_folder_of_that_name_does_not_hide_a_shipped_recipe(elsewhere: Path) -> None:
    (elsewhere / "demo").mkdir()
    assert Recipe.load("demo").name == "demo"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("grpo", ["tiny/grpo", "tiny/dgpo", "tiny/mixgrpo"]),
        ("deploy/recipes/demo.tml", ["demo"]),
        ("sd15_aestetic", ["sd15_aesthetic", "families/sd21_aesthetic", "families/sd15_draft_aesthetic"]),
        ("nothing like that", []),
        ("", []),
    ],
)
def test_an_unknown_name_is_refused_with_the_near_ones(wrong: str, near: list[str]) -> None:
    assert near_recipes(wrong) == near
    with pytest.raises(
        ValueError,
        match=r"the name of a shipped recipe \(`ddpo config recipes` lists them\)"
        + (f"; did you mean {near[0]}" if near else ", such as demo or tiny/grpo$"),
    ):
        Recipe.load(wrong)
