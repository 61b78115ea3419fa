"""What the documentation says can be typed is typed here, and its examples run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components
from tests.rated_images import save_images, write_ratings
from tests.tiny_clip import save_tiny_clip

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(verb: str) -> list[str]:
    """Those that are typed at the root; the example's, in a folder of its own, are run by tests/test_digits.py."""
    at_root = [block for page in PAGES for block in blocks(page, "bash") if not block.startswith("cd ")]
    lines = [line for block in at_root for line in block.splitlines()]
    found = [line.partition("  #")[0].strip() for line in lines if line.startswith(verb)]
    return list(dict.fromkeys(found))  # what two pages name is run once


def test_the_documentation_has_commands_to_run() -> None:
    assert len(commands("ddpo ")) >= 4 and commands("make ")


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for page in PAGES for word in re.findall(r"make ([a-z-]+)`", page.read_text())}
    targets |= {command.split()[1] for command in commands("make ")}
    assert {"demo", "test", "check", "test-system"} <= targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


RECIPES = ROOT / "deploy" / "recipes"


@pytest.mark.parametrize("recipe", sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml")))
def test_every_recipe_is_checked_and_named_in_the_readme_or_on_a_page_of_recipes(recipe: str) -> None:
    build_components(Recipe.load(RECIPES / recipe))
    of_recipes = ("algorithms", "aesthetic", "evaluation", "full_fine_tuning", "model_families", "rewards")
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in of_recipes)]
    assert f"`{recipe}`" in "".join(page.read_text() for page in pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_linked_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_example_rewards_score_pictures(tmp_path: Path) -> None:
    function, entry = [
        block
        for block in blocks(ROOT / "docs" / "extending.md", "python")
        if "def brightness" in block or "Warmth" in block
    ]
    images = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    spaces: list[dict] = [{"__name__": "example"}, {"__name__": "example"}]
    exec(compile(function, "function", "exec"), spaces[0])
    exec(compile(entry, "entry", "exec"), spaces[1])
    reward: Reward = spaces[1]["Warmth"](strength=2.0)
    assert spaces[0]["brightness"](images, ["a", "b"], [{}, {}]).tolist() == [0, 1]
    images[1, :, :, 2] = 0
    assert reward.load("cpu")(images, ["a", "b"], [{}, {}]).tolist() == [0, 2]


@pytest.mark.thorough
def test_the_readmes_ddpo_commands_run_as_they_stand(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy" / "recipes", tmp_path / "deploy" / "recipes")
    demo = tmp_path / "deploy" / "recipes" / "demo.toml"
    # The commands are run as they stand; a part of the images that they sample, in fewer steps: all take minutes.
    text = demo.read_text()
    for sizes in (
        ("images = 135", "images = 9"),
        ("batches_per_round = 4", "batches_per_round = 1"),
        ("_steps = 15", "_steps = 6"),
    ):
        assert text.count(sizes[0]) == 1
        text = text.replace(*sizes)
    demo.write_text(text)
    write_ratings(tmp_path / "ratings.csv", save_images(tmp_path / "images", 100))
    save_tiny_clip(tmp_path / "clip")
    (tmp_path / "config.json").write_text(blocks(ROOT / "docs" / "coming_from_trl.md", "json")[0])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands("ddpo "):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/quick/report/before_after.png").stat().st_size > 10_000
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


@pytest.mark.thorough
def test_a_reward_beside_the_command_is_found_on_ray(tmp_path: Path, tables: dict) -> None:
    function = next(block for block in blocks(ROOT / "docs" / "extending.md", "python") if "def brightness" in block)
    (tmp_path / "my_rewards.py").write_text(function)
    tables["reward"] = {"name": "function", "path": "my_rewards:brightness"}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    command = [Path(sys.executable).parent / "ddpo", "train", "recipe.toml", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reward 0." in done.stdout
