"""Count the floating-point operations of a recipe's networks per image on torch's meta device, without running them.

`python -m benchmarks.recipe_work` prints the numbers of docs/model_families.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.memory.meta_device import synthetic_conditioning
from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.deploy.driver.components import Components, build_components

RECIPES = Path(__file__).parents[1] / "deploy" / "recipes"
NAMES = (
    "sd15_aesthetic",
    "families/sd21_aesthetic",
    "families/sdxl_aesthetic",
    "families/sdxl_full",
    "families/sd35_medium_pickscore",
    "families/sd35_medium_window",
    "families/flux_dev_pickscore",
)
FLOPS_A_SECOND = 1e14  # Stable Diffusion 1.5's rate on an H100 (docs/performance.md)


@dataclass(frozen=True)
class RowWork:
    """Operations of the network for one row of its batch."""

    forward: int
    both: int  # forward and backward, for adapters or full fine-tuning, as the recipe says
    recomputed: int  # by gradient checkpointing in the backward pass: about one forward pass


def row_work(config: DiffusersConfig, sampling: SamplingTable) -> RowWork:
    """Count a forward pass, and a forward and backward pass."""
    quiet_libraries()
    import diffusers

    configs = {part: config.part_config(part) for part in (config.network_name, "vae", *config.text_parts)}
    network_class: Any = getattr(diffusers, config.network_class)
    with torch.device("meta"):
        network = network_class.from_config(configs[config.network_name])
    make_trainable(network, config.train, config.lora)
    latents = torch.empty(1, *config.latent_shape(dict(network.config)), device="meta")
    rows = synthetic_conditioning(config.conditioning_shapes(configs), {}, 1, "meta")
    call = config.network_call(sampling)

    def predict() -> Tensor:
        return call(network, latents, torch.empty(1, device="meta"), **rows)

    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        predict()
    with FlopCounterMode(display=False) as both:
        predict().sum().backward()
    once = forward.get_total_flops()
    return RowWork(once, both.get_total_flops(), once if config.gradient_checkpointing else 0)


def image_work(components: Components) -> float:
    """Return the operations per image: sampling, learning and the KL's passes, without decoding and scoring."""
    config: Any = components.policy
    recipe, algorithm = components.recipe, components.algorithm
    assert algorithm.columns <= {"reference_means"}, "these passes are not counted"
    row = row_work(config, recipe.sampling)
    transitions = (
        algorithm.transitions_per_image(recipe, config.stochastic_steps(recipe.sampling)) * recipe.learner.inner_epochs
    )
    of_transition = row.both + row.recomputed + (row.forward if "reference_means" in algorithm.columns else 0)
    return config.branches(recipe.sampling) * (recipe.sampling.num_steps * row.forward + transitions * of_transition)


def main(names: Sequence[str]) -> None:
    """Print the table's last two columns."""
    for name in names or NAMES:
        recipe = Recipe.load(RECIPES / f"{name}.toml", [])
        flops = image_work(build_components(recipe))
        hours = flops * recipe.images_per_round * recipe.rounds / FLOPS_A_SECOND / 3600
        print(f"{name}.toml: {flops / 1e12:,.0f} TFLOP an image, {hours:.0f} GPU-hours", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
