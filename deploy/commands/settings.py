"""Sampling settings that are saved with a result, and their differences from the training of the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_ddpo.common.run_storage.run_folder import without_none
from ray_ddpo.deploy.commands.weights.given_base import run_of
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.evaluation.eval_result import EvalResult

# Keys that do not influence an evaluation's images: numbers of images, training, and locations of files.
NOT_OF_AN_IMAGE = {
    "sampling": (
        "batch_size",
        "batches_per_round",
        "timestep_fraction",
        "skip_last_steps",
        "sde_window_order",
        "sde_window_rounds",
    ),
    "policy": ("model", "train", "lora", "gradient_checkpointing"),
}


def image_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a resolved recipe that decide what an image looks like, with their values."""
    tables = without_none(dict(tables))
    return {
        f"{table}.{key}": value
        for table, others in NOT_OF_AN_IMAGE.items()
        for key, value in tables.get(table, {}).items()
        if key not in others
    }


def kept_settings(components: Components, images: EvalResult) -> dict[str, Any]:
    """Return the settings to save with a result: these keys, the size in pixels, and the seeds with their origin."""
    height, width = images.pixels.shape[1:3]
    evaluation = components.recipe.evaluation
    return {
        **image_settings(components.resolved()),
        "width": width,
        "height": height,
        "images": len(images.seeds),
        "evaluation.seed": evaluation.seed,
        "evaluation.split": evaluation.split,
        "seeds": list(images.seeds),
    }


def settings_in_words(kept: Mapping[str, Any]) -> str:
    """Format the settings as one line for the terminal."""
    return (
        f"sampled with {kept['sampling.num_steps']} steps, guidance {kept['sampling.guidance_scale']:g}, "
        f"eta {kept['sampling.eta']:g}, {kept['width']} × {kept['height']} pixels, "
        f"{kept.get('policy.sampler_dtype') or kept['policy.dtype']}, {kept['images']} seeds of evaluation.seed "
        f"{kept['evaluation.seed']} ({kept['evaluation.split']})"
    )


def differing_settings(weights: Sequence[str], tables: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs from the training of the given runs."""
    now, lines = image_settings(tables), []
    for location in weights:
        run = run_of(location)
        trained = image_settings(run.recipe_tables()) if run else now
        for key in sorted(now.keys() | trained.keys()):
            if trained.get(key) != now.get(key):
                before, here = (repr(each[key]) if key in each else "not given" for each in (trained, now))
                lines.append(f"{key} is {here} here, and was {before} in the training of {location}")
    return lines
