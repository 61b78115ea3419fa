"""ddpo sample: sample images with a run's weights, as PNGs."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ray_ddpo.actors.evaluation.eval_set import decoded
from ray_ddpo.common.diffusion.rollout import evaluation_window, sample_trajectories
from ray_ddpo.common.run_storage.run_folder import weights_here
from ray_ddpo.deploy.commands.settings import differing_settings
from ray_ddpo.deploy.commands.weights.given_base import check_given
from ray_ddpo.deploy.commands.weights.given_weights import (
    default_output,
    load_policy,
    recipe_of,
    refuse_output_file,
)
from ray_ddpo.deploy.driver.components import SAMPLING, build_components

OUTPUT = "samples"  # default folder, in the run's


@dataclass(frozen=True)
class SampleRequest:
    """Prompts to sample, weights to use, and the folder for the images."""

    weights: str  # a run's folder, or a LoRA's file or folder
    recipe: str | None
    prompts: tuple[str, ...]
    seed: int
    output: str | None  # None: `samples` in the run's folder


def sample(request: SampleRequest, overrides: list[str]) -> Iterator[Path]:
    """Sample one image per prompt and yield the path of each as it is written.

    Raises:
        ValueError: There are no weights or there is no recipe.
    """
    recipe = recipe_of([request.weights], request.recipe, overrides)
    output = Path(request.output) if request.output else default_output([request.weights], OUTPUT)
    refuse_output_file(output)
    with weights_here(request.weights) as path:
        policy = load_policy(recipe, path)
    parts = build_components(recipe, used=SAMPLING)
    check_given([request.weights], request.recipe, parts.policy.loaded_base("sampler"), overrides)
    for line in differing_settings([request.weights], parts.resolved()):
        print(line, file=sys.stderr, flush=True)
    output.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(request.prompts):
        trajectory = sample_trajectories(
            policy, [prompt], [request.seed + index], recipe.sampling, evaluation_window(recipe.sampling)
        )
        pixels = decoded(policy, trajectory, [prompt])[0]
        path = output / f"{index:03d}-{_file_name(prompt)}-seed{request.seed + index}.png"
        if path.exists():
            print(f"{path} was there and is replaced", file=sys.stderr, flush=True)
        Image.fromarray(pixels).save(path)
        yield path


def _file_name(prompt: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in prompt)[:60]
