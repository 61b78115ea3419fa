"""Find recipe and policy for weights given by path: a run's folder, its `best/`, or a LoRA's file or folder."""

from collections.abc import Sequence
from pathlib import Path

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, read_lora_settings
from ray_ddpo.common.diffusion.lora.files import holds_lora, read_lora_file
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.diffusion.policy_trial import load_checked
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.commands.weights.given_base import run_of
from ray_ddpo.deploy.driver.components import LOADING, build_components

PIPELINE_FILE = "model_index.json"  # of diffusers


def recipe_of(weights: Sequence[str], named: str | None, overrides: list[str]) -> Recipe:
    """Load the named recipe, else the recipe of the first of `weights` that is a run.

    Raises:
        ValueError: no recipe is named, and none of the weights is a run.
    """
    if named is not None:
        return Recipe.load(named, overrides)
    folders = [RunFolder(location) for location in weights]
    run = next((folder for folder in folders if folder.storage.exists(folder.recipe)), None)
    if run is None:
        for place in [folder.storage.local_path for folder in folders]:
            if place and not place.exists():
                raise ValueError(f"there is nothing at {place}: give a run's folder, or a LoRA's file or folder")
            refuse_recipe(place)
        around = next((found.location for found in map(run_of, weights) if found), None)
        which = f", such as --recipe {around}/{RunFolder.recipe}" if around else ""
        raise ValueError(
            f"{', '.join(weights)} is no run's folder with a recipe: say with --recipe whose model these "
            f"weights are for{which}"
        )
    return run.load_recipe(overrides)


def refuse_recipe(place: Path | None) -> None:
    """Raise ValueError if a recipe is given in the place of weights."""
    if place is None or place.suffix != ".toml":
        return
    if place.name == RunFolder.recipe:
        raise ValueError(f"{place} is a recipe, and weights are needed: give the run's folder, {place.parent}")
    raise ValueError(f"{place} is a recipe, and weights are needed: name it with --recipe, beside a run or a LoRA")


def default_output(weights: Sequence[str], name: str) -> Path:
    """Return the folder `name` of the first run that some of the weights lie in.

    It is in the current folder if they lie in no run, or if the run is in an object store.
    """
    folders = (run.storage.local_path for run in map(run_of, weights) if run)
    return next((folder / name for folder in folders if folder), Path(name))


def refuse_output_file(output: Path) -> None:
    """Raise ValueError if `--output` is a file or inside one, before models are loaded."""
    taken = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if taken:
        raise ValueError(f"--output is {str(output)!r}, and {taken} is a file: give a folder")


def load_policy(recipe: Recipe, weights: Path | None) -> Policy:
    """Load the recipe's model with a run's weights or with any LoRA that diffusers reads.

    A LoRA's strength comes from its file; the recipe's rank and alpha have no influence.

    Args:
        recipe: with the model.
        weights: their folder or file; None: the pretrained model.

    Raises:
        ValueError: the weights are missing or do not fit the model.
    """
    config, device = build_components(recipe, used=LOADING).policy, settle(recipe.runtime)

    def load(config: PolicyConfig) -> Policy:
        return load_checked(config, device, recipe.sampling, "sampler")

    if weights is None:  # new adapters change nothing
        return load(_pretrained(config))
    refuse_recipe(weights)
    if (weights / PIPELINE_FILE).is_file():
        raise ValueError(
            f"{weights} is a whole pipeline, of which only the network would be taken: for its network alone give "
            f"the folder in it, and for all of it --policy.model {weights}"
        )
    network = network_folder(weights)
    if network or (config.train == "full" and not holds_lora(weights)):
        policy = load(config.model_copy(update={"train": "full"}))
        policy.restore(network or weights)
        return policy
    config = config.model_copy(update={"train": "lora"})
    file = read_lora_file(weights)
    if isinstance(config, DiffusersConfig) and file.is_ours and file.part != config.network_name:
        raise ValueError(
            f"the LoRA {file.path} does not fit: it is for a {file.part}, and the model has a {config.network_name}"
        )
    if isinstance(config, DiffusersConfig) and not file.is_ours:
        policy = load(_pretrained(config))
        assert isinstance(policy, DiffusersPolicy), "a pipeline of diffusers'"
        policy.take_lora(file)
        return policy
    settings = read_lora_settings(file.path)
    policy = load(config.model_copy(update={"lora": settings}) if settings else config)
    policy.restore(file.path)
    return policy


def _pretrained(config: PolicyConfig) -> PolicyConfig:
    """Return the configuration without the LoRA file that training starts from."""
    lora = getattr(config, "lora", None)
    if not isinstance(lora, LoraSettings) or lora.path is None:
        return config
    return config.model_copy(update={"lora": type(config).model_fields["lora"].default})
