"""Recipes that ship with the program, found by name: `demo`, `sd15_aesthetic`, `tiny/grpo`."""

import difflib
import itertools
import os
import re
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
MOST_NEAR = 3  # names that an error suggests


def shipped_recipes() -> dict[str, Path]:
    """Return the files of all shipped recipes by name: the path below the folder of recipes, without its ending."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.toml"))}


def described_recipes() -> list[str]:
    """Return one line for each shipped recipe: its name, and the first sentence of the comment at its head."""
    recipes = shipped_recipes()
    width = max(map(len, recipes))
    return [f"{name:<{width}}  {_first_sentence(path.read_text(encoding='utf-8'))}" for name, path in recipes.items()]


def _first_sentence(text: str) -> str:
    """Return the first sentence of the comments at the head of a TOML file, without the line for editors."""
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in head if not line.startswith("#:"))
    return re.split(r"(?<=[a-z\d)]\.) (?=[A-Z`])|(?<=[\w)]): ", words)[0].rstrip(".")


def recipe_file(named: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe named by its path or, if there is no such file, by a shipped recipe's name."""
    path = Path(named)
    return path if path.is_file() else shipped_recipes().get(str(named), path)


def near_recipes(named: str | os.PathLike[str]) -> list[str]:
    """Return the names of shipped recipes that are closest to a name or path; none if nothing is close."""
    names, wanted = list(shipped_recipes()), Path(named).stem
    same = [name for name in names if wanted and wanted in name.split("/")]
    by_file = {name.rpartition("/")[2]: name for name in reversed(names)}
    whole = difflib.get_close_matches(str(named).removesuffix(".toml"), names, n=MOST_NEAR)
    close = [by_file[file] for file in difflib.get_close_matches(wanted, list(by_file), n=MOST_NEAR)]
    return list(dict.fromkeys([*same, *whole, *close]))[:MOST_NEAR]
