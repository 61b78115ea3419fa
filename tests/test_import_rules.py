"""Who may import whom, and the budgets: read from the source, and each rule shown to catch what it forbids."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.import_rules import RULES, Source

ROOT = Path(__file__).parents[1]
PROGRAM = ("common", "actors", "learner", "deploy")


@cache  # each is parsed once for all rules
def sources_in(*folders: str) -> list[Source]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@cache
def program() -> list[Source]:
    return [*sources_in(*PROGRAM), *(Source(name, (ROOT / name).read_text()) for name in ("train.py", "ddpo.py"))]


BY_NAME = {rule.__name__: rule for rule in RULES}
OF_ALL_FILES = (
    "short_files",
    "short_functions",
    "few_arguments",
    "absolute_imports",
    "no_utils",
    "opens_with_a_sentence",
)


def offences(rule: Callable, sources: list[Source]) -> list[str]:
    return [f"{source.path}: {offence}" for source in sources for offence in rule(source)]


def test_the_program_is_there_to_be_read() -> None:
    paths = {source.path for source in program()}
    assert {
        "common/recipe/recipe.py",
        "actors/sampler.py",
        "learner/learner.py",
        "deploy/driver/workers.py",
        "train.py",
    } <= paths


@pytest.mark.parametrize("name", BY_NAME)
def test_the_program_keeps_the_rule(name: str) -> None:
    assert offences(BY_NAME[name], program()) == []


@pytest.mark.parametrize("name", OF_ALL_FILES)
def test_the_tests_and_the_example_keep_the_budgets_too(name: str) -> None:
    assert offences(BY_NAME[name], sources_in("tests", "docs/digits", "docs/shapes")) == []


DOCUMENTED = '"""What it is for."""\n'
LONG_FUNCTION = "def long():\n" + "    print()\n" * 50
PLANTED = [
    ("layers", "common/schedule.py", "from ray_ddpo.learner.learner import Learner"),
    ("layers", "common/diffusion/lora/adapters.py", "import ray_ddpo.deploy.driver.components"),
    ("layers", "actors/sampler.py", "from ray_ddpo.learner.algorithms import losses"),
    ("layers", "learner/learner.py", "def f():\n    import ray_ddpo.actors.sampler"),
    ("layers", "learner/learner.py", "from ray_ddpo.deploy.driver.components import parts_of"),
    ("layers", "actors/sampler.py", "import train"),
    ("layers", "common/recipe/registry.py", 'ROOM = {"jpeg": "ray_ddpo.actors.rewards.jpeg:Jpeg"}'),
    ("layers", "common/recipe/registry.py", 'importlib.import_module("ray_ddpo.actors.sampler")'),
    ("composers", "deploy/driver/workers.py", "from ray_ddpo.train import train"),
    ("composers", "deploy/driver/components.py", "from ray_ddpo.deploy.commands.plan.plan import plan"),
    ("composers", "train.py", "from ray_ddpo.deploy.commands.report import report"),
    ("composers", "deploy/commands/plan/plan.py", "import ddpo"),
    ("composers", "deploy/commands/plan/plan.py", "from ray_ddpo.train import train"),
    ("rooms", "actors/rewards/aesthetic.py", "from ray_ddpo.actors.rewards.jpeg import JpegCompressibility"),
    ("rooms", "common/trackers/jsonl.py", "import ray_ddpo.common.trackers.terminal"),
    ("ray_where_it_distributes", "actors/sampler.py", "import ray"),
    ("ray_where_it_distributes", "learner/learner.py", "def f():\n    from ray.util import queue"),
    ("ray_where_it_distributes", "deploy/commands/plan/plan.py", "import ray.data as data"),
    ("distributed_where_ranks_are", "learner/learner.py", "import torch.distributed as distributed"),
    ("distributed_where_ranks_are", "learner/ray_learner_group.py", "from torch import distributed"),
    ("torch_free", "common/recipe/recipe.py", "import torch"),
    ("torch_free", "common/prompts.py", "def f():\n    from torch import nn"),
    ("torch_free", "common/schedule.py", "from jaxtyping import Float"),
    ("torch_free", "common/recipe/registry.py", "from ray_ddpo.common.trajectory import DTYPES"),
    ("absolute_imports", "actors/sampler.py", "from . import rewards"),
    ("absolute_imports", "actors/sampler.py", "from ..common.config import Recipe"),
    ("no_utils", "common/utils.py", DOCUMENTED),
    ("algorithms_in_their_room", "learner/learner.py", 'if recipe.algorithm.name == "ddpo_is":\n    pass'),
    ("algorithms_in_their_room", "train.py", 'clipped = name in ("ddpo_is", "ddpo_sf")'),
    ("algorithms_in_their_room", "train.py", 'match name:\n    case "ddpo_is":\n        pass'),
    ("short_files", "common/recipe/recipe.py", "\n" * 301),
    ("short_files", "train.py", "\n" * 121),
    ("short_functions", "common/recipe/recipe.py", LONG_FUNCTION),
    ("few_arguments", "common/recipe/recipe.py", "class A:\n    def f(self, a, b, c, d, *, e, f, g): ..."),
    ("nothing_swallowed", "actors/sampler.py", "try:\n    f()\nexcept Exception:\n    pass"),
    ("nothing_swallowed", "actors/sampler.py", "try:\n    f()\nexcept:\n    print()"),
    (
        "nothing_swallowed",
        "actors/sampler.py",
        "try:\n    f()\nexcept (OSError, BaseException) as error:\n    print(error)",
    ),
    ("opens_with_a_sentence", "actors/sampler.py", "import os"),
]
ALLOWED = [
    (
        "layers",
        "learner/learner.py",
        "from ray_ddpo.common.recipe.recipe import Recipe\nfrom learner.losses import clipped_surrogate",
    ),
    (
        "layers",
        "deploy/driver/workers.py",
        "from ray_ddpo.actors.sampler import Sampler\nfrom learner.learner import Learner",
    ),
    ("composers", "ddpo.py", "from ray_ddpo.train import train\nfrom deploy.commands.plan import plan"),
    (
        "composers",
        "deploy/commands/report/report.py",
        "from ray_ddpo.deploy.commands.report.images import reward_curve",
    ),
    ("composers", "common/recipe/recipe.py", "from ray_ddpo.common.trainable import training"),
    ("rooms", "actors/rewards/aesthetic.py", "from ray_ddpo.actors.rewards.reward import Reward"),
    ("ray_where_it_distributes", "actors/rollouts/ray_stream.py", "import ray"),
    ("ray_where_it_distributes", "actors/sampler.py", "from ray_ddpo.common.raycasting import rays"),
    ("distributed_where_ranks_are", "learner/process_group.py", "import torch.distributed"),
    ("torch_free", "common/schedule.py", "import numpy as np\nfrom common.config import Recipe"),
    ("absolute_imports", "actors/sampler.py", "from ray_ddpo.actors import rewards"),
    ("no_utils", "common/prompts.py", DOCUMENTED),
    ("algorithms_in_their_room", "learner/algorithms/ddpo_is.py", 'assert name == "ddpo_is"'),
    ("short_files", "common/recipe/recipe.py", "\n" * 300),
    ("short_functions", "common/recipe/recipe.py", LONG_FUNCTION.replace("    print()\n", "", 1)),
    ("few_arguments", "common/recipe/recipe.py", "class A:\n    def f(self, a, b, c, d, *, e, f): ..."),
    ("nothing_swallowed", "common/trackers/fan_out.py", "try:\n    f()\nexcept Exception:\n    pass"),
    ("nothing_swallowed", "actors/sampler.py", "try:\n    f()\nexcept BaseException:\n    close()\n    raise"),
    ("opens_with_a_sentence", "actors/sampler.py", DOCUMENTED),
]


@pytest.mark.parametrize(("name", "path", "text"), PLANTED)
def test_a_planted_offence_is_caught(name: str, path: str, text: str) -> None:
    assert list(BY_NAME[name](Source(path, text)))


@pytest.mark.parametrize(("name", "path", "text"), ALLOWED)
def test_what_is_allowed_is_let_pass(name: str, path: str, text: str) -> None:
    assert list(BY_NAME[name](Source(path, text))) == []


def test_every_rule_has_an_offence_planted_and_something_allowed() -> None:
    assert {name for name, _, _ in PLANTED} == {name for name, _, _ in ALLOWED} == set(BY_NAME)


def loaded_after(statements: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after these statements."""
    code = f"{statements}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(output.split())


def test_a_recipe_and_a_schedule_are_read_without_torch() -> None:
    loaded = loaded_after("import ray_ddpo.common.recipe.recipe, common.registry, common.schedule, common.prompts")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "ray"}


CHECK_THE_DEMO = """
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.recipe.registry import entry_class
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.deploy.driver.components import parts_of
from ray_ddpo.learner.algorithms import ALGORITHMS
parts_of(Recipe.load("deploy/recipes/demo.toml"))
for room in (POLICIES, TRACKERS, REWARDS, ALGORITHMS):
    for name in room:
        entry_class(room, name, "entry")
"""


def test_entries_are_built_and_checked_without_diffusers_or_transformers() -> None:
    loaded = loaded_after(CHECK_THE_DEMO)
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "peft"}
