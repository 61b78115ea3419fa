"""Real reward hacking: the guard ends the run, and the better version is kept."""

from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.weights.run_weights import run_weights
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.train import run_training

pytestmark = pytest.mark.thorough
GUARD = Path(__file__).parents[2] / "deploy" / "recipes" / "tiny" / "guard.toml"


@pytest.mark.rotated(every=2, group="longest")
def test_dark_images_raise_an_alarm_and_the_better_version_is_kept(tmp_path: Path) -> None:
    """The recipe as it stands, evaluated half as often: it takes minutes."""
    recipe = Recipe.load(GUARD, ["--evaluation.every", "4", "--output_dir", str(tmp_path)])
    run_training(recipe, serial=True)
    folder = RunFolder(recipe.run_path())
    figures = EvalLog(folder.storage).entries()
    ended, best = folder.guard_ended(), folder.best_version()
    assert ended is not None and best is not None
    assert ended["policy_version"] < recipe.rounds and "animal_classifier fell from" in ended["alarms"][0]
    darker = figures[-1]["scores"]["reward"]  # that is what made it an alarm and no failure to learn
    assert darker["change"] > 10 * darker["standard_error"]
    alarms = {each["policy_version"]: each["alarms"] for each in figures}
    assert (
        best["policy_version"] == ended["weights_of"] < ended["policy_version"] and not alarms[best["policy_version"]]
    )
    assert (
        max(figures[:-1], key=lambda each: each["scores"]["reward"]["mean"])["policy_version"] == best["policy_version"]
    )
    weights = run_weights(folder)
    assert (weights.policy_version, weights.fingerprint) == (best["policy_version"], best["fingerprint"])
    with weights.here() as path:  # which holds the files' bits against the fingerprint
        assert (path / "lora").is_dir()
