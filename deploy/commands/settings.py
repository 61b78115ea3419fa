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
        "skip_first_steps",
        "skip_last_steps",
        "sde_window_order",
        "sde_window_rounds",
        "sde_window_stride",
        "sde_window_end",
        "sde_window_decay",
        "sde_window_decay_from",
        "shared_prefix",
        "solver",
        "cache_interval",
        "kl_reward",
        "backprop_steps",
    ),
    "policy": ("model", "train", "lora", "gradient_checkpointing", "cuda_graphs", "compile_blocks"),
}

AS_BEFORE = (("deterministic", False),)  # keys that earlier runs do not have, with the value that they sampled by


def image_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a resolved recipe that decide what an image looks like, with their values."""
    tables = without_none(dict(tables))
    given = {key: tables.get("evaluation", {}).get(key) for key in ("num_steps", "solver", "cache_interval")}
    held_out = {f"evaluation.{key}": value for key, value in given.items() if value not in (None, "first_order", 1)}
    return held_out | {
        f"{table}.{key}": value
        for table, others in NOT_OF_AN_IMAGE.items()
        for key, value in tables.get(table, {}).items()
        if key not in others and (key, value) not in AS_BEFORE
    }


def kept_settings(components: Components, images: EvalResult) -> dict[str, Any]:
    """Return the settings to save with a result: these keys, the size in pixels, and the seeds with their origin."""
    *frames, height, width, _ = images.pixels.shape[1:]
    evaluation = components.recipe.evaluation
    return {
        **image_settings(components.resolved()),
        "width": width,
        "height": height,
        **({"frames": frames[0], "frame_rate": images.frame_rate} if frames else {}),
        "images": len(images.seeds),
        "evaluation.seed": evaluation.seed,
        "evaluation.split": evaluation.split,
        "seeds": list(images.seeds),
    }


def settings_in_words(kept: Mapping[str, Any]) -> str:
    """Format the settings as one line for the terminal."""
    solver, interval = kept.get("evaluation.solver"), kept.get("evaluation.cache_interval")
    saved = f" of {solver}" if solver else f" and a cache_interval of {interval}" if interval else ""
    num_steps = kept.get("evaluation.num_steps") or kept["sampling.num_steps"]
    return (
        f"sampled with {num_steps} steps{saved}, guidance {kept['sampling.guidance_scale']:g}, "
        f"{_noise_in_words(kept)}, {kept['width']} × {kept['height']} pixels, {_frames_in_words(kept)}"
        f"{kept.get('policy.sampler_dtype') or kept['policy.dtype']}, {kept['images']} seeds of evaluation.seed "
        f"{kept['evaluation.seed']} ({kept['evaluation.split']})"
    )


def _frames_in_words(kept: Mapping[str, Any]) -> str:
    """Return the frames of a clip, with a comma behind; nothing of an image."""
    return f"{kept['frames']} frames at {kept['frame_rate']:g} a second, " if "frames" in kept else ""


def _noise_in_words(kept: Mapping[str, Any]) -> str:
    """Return the noise of steps: none, or its level with the stochastic sampler if the recipe chose one."""
    if kept.get("sampling.deterministic"):
        return "no noise"
    sde = kept.get("sampling.sde")
    return f"eta {kept['sampling.eta']:g}" + (f" of {sde!r}" if sde else "")


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
