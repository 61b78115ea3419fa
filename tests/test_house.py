"""The rules of the house that import-linter and ruff cannot check: independent components, and what loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.learner.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "actors", "learner", "deploy", "benchmarks", "tests", "docs")
SOURCES = [
    *sorted((ROOT / "ray_ddpo").glob("*.py")),
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))),
]
LONGEST = {"ray_ddpo/train.py": 120}  # the driver is one page
LONGEST_FILE = 400
LONGEST_FUNCTION = 50


def imported(path: Path) -> set[str]:
    """Return every module that a file imports."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("registry", [POLICIES, TRACKERS, REWARDS, ALGORITHMS])
def test_a_component_imports_no_other_component_of_its_registry(registry: dict[str, str]) -> None:
    modules = {path.partition(":")[0] for path in registry.values()}
    files = {module: ROOT / f"{module.replace('.', '/')}.py" for module in modules}
    found = {module: imported(file) & (modules - {module}) for module, file in files.items()}
    # A variant may extend the family that its file is named after, as wan_i2v does wan.
    others = {module: {name for name in names if not module.startswith(name)} for module, names in found.items()}
    assert others == dict.fromkeys(modules, set())


def test_no_file_outside_the_algorithms_compares_algorithm_names() -> None:
    found = []
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(("learner/algorithms/", "tests/", "benchmarks/", "docs/")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.MatchValue):
                named = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                found += [f"{place}:{node.lineno}" for name in named if name in ALGORITHMS]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short_and_files_have_docstrings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the file does not say what it is for"
    assert len(text.splitlines()) <= LONGEST.get(path.relative_to(ROOT).as_posix(), LONGEST_FILE)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION]
    assert long == []


def loaded_after(statements: str) -> set[str]:
    """Return the top-level modules that a fresh process has loaded after these statements."""
    code = f"{statements}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(output.split())


def test_a_recipe_and_a_schedule_are_read_without_torch() -> None:
    modules = ("recipe.recipe", "recipe.registry", "schedule", "prompts")
    loaded = loaded_after(f"import {', '.join(f'ray_ddpo.common.{name}' for name in modules)}")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "ray"}


CHECK_THE_DEMO = """
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import component_class
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.algorithms import ALGORITHMS
build_components(Recipe.load("deploy/recipes/demo.toml"))
for registry in (POLICIES, TRACKERS, REWARDS, ALGORITHMS):
    for name in registry:
        component_class(registry, name, "entry")
"""


def test_components_are_built_and_checked_without_diffusers_or_transformers() -> None:
    loaded = loaded_after(CHECK_THE_DEMO)
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "peft"}
