"""Weights that somebody names: a run's folder, its `best/`, a LoRA's file or folder; whose recipe, and the policy under them."""

from collections.abc import Sequence
from pathlib import Path

from common.config import Recipe
from common.diffusion.lora import lora_file, read_lora_settings
from common.diffusion.policy import Policy
from common.diffusion.policy_trial import load_checked
from common.diffusion.weight_files import network_folder
from common.run_folder import RunFolder
from common.runtime import settle
from deploy.parts import parts_of


def recipe_of(weights: Sequence[str], named: str | None, overrides: list[str]) -> Recipe:
    """The recipe that is named, else that of the first of `weights` that is a run. ValueError: none of them is one."""
    if named is not None:
        return Recipe.load(named, overrides)
    folders = [RunFolder(location) for location in weights]
    run = next((folder for folder in folders if folder.storage.exists(folder.recipe)), None)
    if run is None:
        raise ValueError(
            f"{', '.join(weights)} is no run's folder with a recipe: say with --recipe whose model these weights are for"
        )
    return run.load_recipe(overrides)


def load_policy(recipe: Recipe, weights: Path | None) -> Policy:
    """The recipe's policy with a run's weights, or with any LoRA that fits its network; None: as it was pretrained.

    ValueError: there are none, or they do not fit.
    """
    policy_config = parts_of(recipe).policy
    device = settle(recipe.runtime)
    if weights is None:  # new adapters change nothing
        return load_checked(policy_config, device, recipe.sampling, "sampler")
    if policy_config.train == "full":
        policy = load_checked(policy_config, device, recipe.sampling, "sampler")
        policy.restore(network_folder(weights) or weights)
        return policy
    path = lora_file(weights)
    settings = read_lora_settings(path)
    if settings:
        policy_config = policy_config.model_copy(update={"lora": settings})
    policy = load_checked(policy_config, device, recipe.sampling, "sampler")
    policy.restore(path)
    return policy
