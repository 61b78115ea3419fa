"""Find out what `policy.model` names and which of its files a role reads, before anything is loaded."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ray_ddpo.common.diffusion.loading.model_index import INDEX, about_folder, check_folder, known_parts
from ray_ddpo.common.diffusion.loading.part_files import TEXT_FILES
from ray_ddpo.common.diffusion.loading.pipeline import loaded_files, part_weights
from ray_ddpo.common.diffusion.loading.single_file import check_single_file, names_a_file, single_file
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.model_files.model_hub import Weights, folder_here, is_hub_name

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
    from ray_ddpo.common.diffusion.policy import Role


def source_of(config: "DiffusersConfig") -> str:
    """Return the folder or hub name that has the parts' configurations."""
    return (config.single_file_config or config.model) if names_a_file(config.model) else config.model


def check_model(config: "DiffusersConfig", role: "Role") -> None:
    """Check everything about the model that can be told without loading it.

    Raises:
        ValueError: A role cannot load the model.
    """
    if names_a_file(config.model):
        check_single_file(config)
    elif config.single_file_config:
        raise ValueError(
            f"policy.single_file_config is {config.single_file_config!r}, and policy.model, {config.model!r}, is no "
            ".safetensors file: leave it out, a folder has its own configurations"
        )
    folder, source = config.folder(), source_of(config)
    if not folder.exists() and is_hub_name(source) and not source.startswith((".", "/", "~")):
        return
    if not (folder / INDEX).is_file():
        key = "single_file_config" if names_a_file(config.model) else "model"
        raise ValueError(
            f"policy.{key} is {source!r}: there is no {INDEX} in {folder}; give a folder in diffusers' format, a hub name "
            f"(owner/model){'' if key != 'model' else f' or one of {sorted(EMBEDDED_MODELS)}'}"
        )
    with about_folder(config):
        check_folder(config, folder, role)
        if not names_a_file(config.model) and _has_weights(config, folder, role):
            part_weights(config, folder, role)


def _has_weights(config: "DiffusersConfig", folder: Path, role: "Role") -> bool:
    """Return whether the folder has more than configurations. Configurations alone are enough for a plan."""
    parts = [part for part, known in known_parts(config, role).items() if known.kind == "model"]
    return any(path.suffix[1:] not in TEXT_FILES for part in parts for path in (folder / part).iterdir())


def files_by_role(config: "DiffusersConfig", role: "Role", texts: bool = True) -> tuple[Weights, ...]:
    """Return the files that a role reads: by name if the model is on this machine, otherwise by patterns.

    Args:
        config: the model family's keys.
        role: the role that reads them.
        texts: whether to include configurations and vocabularies.
    """
    if names_a_file(config.model):
        return single_file(config, role)
    source = str(config.folder()) if config.folder().is_dir() else config.model
    folder = folder_here(Weights(source, (INDEX,), "policy.model"))
    kinds = ("safetensors", *TEXT_FILES) if texts else ("safetensors",)
    parts = [part for part, known in known_parts(config, role).items() if texts or known.kind == "model"]
    files = [f"{part}/*.{kind}" for part in parts for kind in kinds]
    with suppress(ValueError):  # keep the patterns then; loading reports what is wrong
        if folder is not None:
            files = loaded_files(config, folder, role, texts)
    return (Weights(source, (INDEX, *files), "policy.model"),)
