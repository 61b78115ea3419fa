"""Find the recipes that ship with the package by their names (no torch)."""

import os
from pathlib import Path

SHIPPED = Path(__file__).parents[2] / "deploy" / "recipes"  # through the package's links, in a clone and in the wheel


def shipped_recipes() -> list[str]:
    """Return the names of all recipes that ship with the package: `demo`, or `tiny/grpo` of those in a folder."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.toml"))


def recipe_path(recipe: str | os.PathLike[str]) -> Path:
    """Return the path of a recipe's file: the path given if something is there, else that of the shipped recipe of this name.

    The folder of a shipped recipe may be left out if no other has its name.
    """
    path, name = Path(recipe), os.fspath(recipe)
    if path.exists() or path.is_absolute():
        return path
    name = name.removesuffix(".toml")
    found = [each for each in shipped_recipes() if each == name] or [
        each for each in shipped_recipes() if each.rpartition("/")[2] == name
    ]
    return SHIPPED / f"{found[0]}.toml" if len(found) == 1 else path
