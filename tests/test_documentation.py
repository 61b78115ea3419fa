"""Run the commands and examples of the documentation as they stand."""

import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.cli import RUN
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components
from tests.rated_images import save_images, write_ratings
from tests.system.forked_workers import forked_program
from tests.tiny_clip import save_tiny_clip

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks for an example's folder, for a GPU and for a new environment.
ELSEWHERE = ("cd ", "# On a ", "python3 -m venv")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(verb: str, elsewhere: bool = False) -> list[str]:
    """Return the documented commands that begin with `verb`, each once.

    Args:
        verb: The program's name with a space, such as "ddpo ".
        elsewhere: Include the blocks that cannot run here: tests/test_digits.py runs an example's in its folder.
    """
    found = [block for page in PAGES for block in blocks(page, "bash") if elsewhere or not block.startswith(ELSEWHERE)]
    lines = [line for block in found for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    return list(dict.fromkeys(line.partition("  #")[0].strip() for line in lines if line.startswith(verb)))


def small_recipe(path: Path) -> str:
    """Return a recipe with one round and few images and steps, so that documented commands take seconds."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    tables["rounds"] = min(tables["rounds"], 2)
    tables["sampling"]["num_steps"] = 6
    tables["sampling"]["batches_per_round"] = 1
    tables["learner"]["batch_size"] = tables["sampling"]["batch_size"]
    tables["learner"]["micro_batch_size"] = "auto"
    tables.setdefault("evaluation", {})["images"] = 9
    return tomli_w.dumps(tables)


def test_the_documentation_has_commands() -> None:
    assert len(commands("ddpo ")) >= 4 and commands("make ")


def test_every_documented_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for page in PAGES for word in re.findall(r"make ([a-z-]+)`", page.read_text())}
    targets |= {command.split()[1] for command in commands("make ")}
    assert {"site", "test", "check", "test-system"} <= targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


RECIPES = ROOT / "deploy" / "recipes"


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("recipe", sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml")))
def test_every_recipe_is_valid_and_documented(recipe: str) -> None:
    build_components(Recipe.load(RECIPES / recipe))
    of_recipes = (
        "algorithms",
        "aesthetic",
        "evaluation",
        "full_fine_tuning",
        "model_families",
        "rewards",
        "differentiable_rewards",
        "text_and_objects",
    )
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in of_recipes)]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert f"`{recipe}`" in text or f"`{recipe.removesuffix('.toml')}`" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_example_rewards_score_images(tmp_path: Path) -> None:
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


def test_documented_commands_are_known_and_name_shipped_recipes() -> None:
    shipped = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.toml")}
    for command in commands("ddpo ", elsewhere=True):
        _, verb, *words = command.split()
        assert verb in RUN or verb == "config", command
        if verb in ("train", "plan", "doctor") and not words[0].endswith(".toml"):
            assert words[0] in shipped, command


def test_documented_commands_have_no_placeholders() -> None:
    placeholder = re.compile(r"(?<![\w/=.-])[A-Z]{2,}(?![\w/=.-])")
    assert [command for command in commands("ddpo ") if placeholder.search(command)] == []


def made_by(command: str) -> set[str]:
    """Return the run and the file that a command makes, as later commands name them."""
    found = set(re.findall(r"--output (\S+)", command))
    if command.startswith("ddpo train"):
        name = re.search(r"--name (\S+)", command) or re.search(r"ddpo train (?:\S*/)?(\w+)", command)
        found.add(f"runs/{name[1]}" if name else "")
    return found


def earlier_needed(command: str, earlier: list[str]) -> list[str]:
    """Return the commands among the earlier ones whose file this command names, or that make or name a run of its own."""
    runs = [{word for word in each.split() if word.startswith("runs/")} for each in (command, *earlier)]
    said = set(command.split()) | made_by(command)
    return [each for each, named in zip(earlier, runs[1:], strict=True) if made_by(each) & said or named & runs[0]]


def test_commands_wait_for_those_whose_output_they_read() -> None:
    earlier = ["ddpo train demo", "ddpo train demo --name quick", "ddpo migrate config.json --output from_trl.toml"]
    assert earlier_needed("ddpo report runs/demo", earlier) == earlier[:1]
    assert earlier_needed("ddpo evaluate runs/again --against runs/quick --output between", earlier) == earlier[1:2]
    assert earlier_needed("ddpo plan from_trl.toml", earlier) == earlier[2:]
    assert earlier_needed("ddpo train demo --from runs/quick --name further", earlier) == earlier[1:2]
    assert earlier_needed("ddpo doctor demo", earlier) == []
    both = ["ddpo evaluate runs/quick --evaluation.num_steps 8"]
    assert earlier_needed("ddpo evaluate runs/quick --evaluation.num_steps 9", both) == both, "they write into one run"


@pytest.mark.thorough
def test_documented_ddpo_commands_run_as_they_stand(tmp_path: Path, cluster_folder: str) -> None:
    shutil.copytree(RECIPES, tmp_path / "deploy" / "recipes")
    demo = tmp_path / "deploy" / "recipes" / "demo.toml"
    demo.write_text(small_recipe(RECIPES / "demo.toml"))
    write_ratings(tmp_path / "ratings.csv", save_images(tmp_path / "images", 100))
    save_tiny_clip(tmp_path / "clip")
    (tmp_path / "config.json").write_text(blocks(ROOT / "docs" / "coming_from_trl.md", "json")[0])
    environment = forked_program(Path(cluster_folder))
    run_of_the_pages = "ddpo train demo --rounds 2 --name quick"
    ended: dict[str, Future[None]] = {}

    def run(command: str, needed: list[Future[None]]) -> None:
        for each in needed:
            each.result()
        # The demo takes minutes: its name stands for the small recipe here.
        typed = re.sub(r"^(ddpo (?:train|plan|doctor)) demo\b", r"\1 deploy/recipes/demo.toml", command)
        done = subprocess.run(typed, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    # A command waits for earlier ones alone, which have been begun before it. So two threads cannot block each other.
    with ThreadPoolExecutor(2) as two_at_once:
        for command in dict.fromkeys([run_of_the_pages, *commands("ddpo ")]):
            needed = [ended[each] for each in earlier_needed(command, list(ended))]
            ended[command] = two_at_once.submit(run, command, needed)
    for each in ended.values():
        each.result()
    assert (tmp_path / "runs/demo/report/before_after.png").stat().st_size > 10_000
    assert len(list((tmp_path / "runs/demo/samples").glob("*.png"))) == 2


@pytest.mark.rotated(every=2, group="longest")
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
