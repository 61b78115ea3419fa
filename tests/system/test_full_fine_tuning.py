"""Full fine-tuning of the embedded model: the held-out reward rises, and images stay images."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.actors.evaluation.image_summary import image_summary
from ray_ddpo.actors.rewards.image_statistics import Brightness, grey
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.train import run_training

pytestmark = pytest.mark.thorough
FULL = Path(__file__).parents[2] / "deploy" / "recipes" / "tiny" / "full.toml"
SHORT_FORM = [
    *("--rounds", "3", "--evaluation.every", "3", "--evaluation.images", "27", "--evaluation.saved_images", "27"),
    *("--evaluation.batch_size", "9", "--sampling.batches_per_round", "3", "--runtime.threads", "1"),
]
# How far a mean over the images may lie from the pretrained model's: added to it, or a share of it.
ADDED = {"dark_share": 0.1, "brightness": 0.15}
SHARES = {"deviation": (0.6, 1.4), "entropy": (0.75, 1.25), "diversity": (0.6, 1.4)}


def statistics(images: list[np.ndarray], prompts: list[str]) -> dict[str, float]:
    """Means over the images, and how much those of one prompt differ."""
    summary = image_summary(np.stack(images), prompts)
    brightness = float(np.mean([Brightness().of(image) for image in images]))
    return {**summary, "brightness": brightness, "deviation": float(np.mean([grey(each).std() for each in images]))}


def out_of_bounds(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """The statistics that say that the images are not what they were."""
    added = [name for name, most in ADDED.items() if not abs(after[name] - before[name]) <= most]
    shares = [name for name, (low, high) in SHARES.items() if not low <= after[name] / before[name] <= high]
    return added + shares


def trained(folder: Path, *options: str) -> tuple[dict, list[str]]:
    """The change of the held-out reward in a short run, and which of its images' statistics are out of bounds."""
    recipe = Recipe.load(FULL, [*SHORT_FORM, "--output_dir", str(folder), *options])
    without_average = recipe.evaluation.model_copy(update={"ema_decay": None})
    recipe = recipe.model_copy(update={"evaluation": without_average})
    run_training(recipe, serial=True)
    log = EvalLog(RunFolder(recipe.run_path()).storage)
    first, last = log.entries()[0], log.entries()[-1]
    images = [log.images(each["policy_version"]) for each in (first, last)]
    prompts = log.read(0)["prompt"].to_pylist()[: len(images[0])]  # the first rows are those of the version itself
    before, after = (statistics(each, prompts) for each in images)
    print({name: (round(before[name], 3), round(after[name], 3)) for name in before}, last["scores"]["reward"])
    return last["scores"]["reward"], out_of_bounds(before, after)


@pytest.mark.rotated(every=2, group="longest")
def test_the_held_out_reward_rises_and_images_are_not_dark_flat_or_all_alike(tmp_path: Path) -> None:
    reward, outside = trained(tmp_path)
    assert reward["change"] > 2 * reward["standard_error"]
    assert outside == []


def test_a_learning_rate_that_destroys_the_network_is_caught_by_the_same_bounds(tmp_path: Path) -> None:
    _, outside = trained(
        tmp_path, "--rounds", "1", "--sampling.batches_per_round", "1", "--learner.learning_rate", "0.01"
    )
    assert outside
