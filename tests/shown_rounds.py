"""A small run with TensorBoard and its media, for tests of round media."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training


def fingerprint(recipe: Recipe) -> str:
    """Return the fingerprint of the weights in the last checkpoint."""
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None
    return load_checkpoint(newest).learner.trained.fingerprint


def shown_in(recipe: Recipe) -> dict:
    """Return the images by round and index, and the counts of log-ratios by round."""
    events = EventAccumulator(
        str(Path(recipe.run_path()) / "tensorboard"), size_guidance={"histograms": 0, "images": 0}
    )
    events.Reload()
    images = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    found: dict = {
        (event.step, int(tag[-2:])): from_png(event.encoded_image_string).tobytes()
        for tag, of_tag in images.items()
        for event in of_tag
    }
    log_ratios = {
        event.step: (event.histogram_value.num, event.histogram_value.sum)
        for event in events.Histograms("histograms/log_ratio")
    }
    return found | {"log_ratios": log_ratios}


def run(tables: dict, name: str, serial: bool, **changes: object) -> Recipe:
    """Run four rounds, three of them with media, and return the recipe."""
    own = {"name": name, "rounds": 4, "media": {"every": 2, "images": 5}, "rollouts": {"images_every": 1}}
    recipe = Recipe.parse({**tables, **own, "trackers": [{"name": "tensorboard"}], **changes})
    run_training(recipe, serial=serial)
    return recipe
