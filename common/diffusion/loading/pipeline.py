"""Load a diffusers pipeline for one role: the parts that it needs, each checked against its loading report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.diffusion.loading.load_part import load_part
from ray_ddpo.common.diffusion.loading.model_index import (
    about_model,
    check_folder,
    known_parts,
)
from ray_ddpo.common.diffusion.loading.part_files import OnlyPickles, PartNotThere, PartWeights, text_files, weights_of
from ray_ddpo.common.diffusion.loading.single_file import load_single_file, names_a_file
from ray_ddpo.common.model_files.file_faults import check_file
from ray_ddpo.common.model_files.model_hub import errors_only, first_line, read_from_hub

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig


def load_pipeline(config: "DiffusersConfig", role: str) -> Any:
    """Return the pipeline with the parts that `role` needs. The other parts are None.

    Raises:
        ValueError: A file or a weight is missing, or is not what its name says.
    """
    import diffusers

    pipeline_class: Any = getattr(diffusers, config.pipeline_class)
    with errors_only():  # the libraries warn about each unneeded weight, such as a CLIP's image tower
        try:
            if names_a_file(config.model):
                return load_single_file(config, pipeline_class, role, unused_parts(config, pipeline_class, role))
            folder = model_folder(config, pipeline_class, role)
            with about_model(config.model):
                return _load_folder(config, pipeline_class, folder, role)
        except OSError as error:
            raise ValueError(
                f"policy.model is {config.model!r}, which cannot be loaded ({first_line(error)})"
            ) from error


def model_folder(config: "DiffusersConfig", pipeline_class: Any, role: str) -> Path:
    """Return the model's folder on this machine. A hub repository is downloaded if it is not in the cache."""
    folder = config.folder()
    if folder.exists():
        return folder
    unused = unused_parts(config, pipeline_class, role)

    def read(local_files_only: bool) -> Path:
        place = pipeline_class.download(
            config.model,
            local_files_only=local_files_only,
            use_safetensors=True,
            trust_remote_code=False,
            variant=config.variant,
            **unused,
        )
        try:
            check_folder(config, Path(place), role)
            part_weights(config, Path(place), role)
        except PartNotThere as error:  # OSError, so that an incomplete cache is downloaded again
            raise OSError(f"{error}; policy.variant names weights that the repository has in another form") from error
        return Path(place)

    return read_from_hub(read, f"policy.model is {config.model!r}, which cannot be loaded", config.model)


def unused_parts(config: "DiffusersConfig", pipeline_class: Any, role: str) -> dict[str, None]:
    """Return the pipeline's parts that a role does not load, as `from_pretrained` takes them to leave them out."""
    modules, _ = pipeline_class._get_signature_keys(pipeline_class)
    return dict.fromkeys(sorted(set(modules) - set(known_parts(config, role))))


def part_weights(config: "DiffusersConfig", folder: Path, role: str) -> dict[str, PartWeights]:
    """Return the weights of each part that a role loads.

    Raises:
        ValueError: They are missing.
    """
    models = {part: known for part, known in known_parts(config, role).items() if known.kind == "model"}
    try:
        found = {part: weights_of(folder, part, known.library, config.variant) for part, known in models.items()}
    except OnlyPickles as error:
        raise PartNotThere(
            f"{error}: convert it where you trust its source, with {conversion(config, error)}"
        ) from error
    if config.variant and role == "sampler" and all(each.variant != config.variant for each in found.values()):
        raise PartNotThere(f"policy.variant is {config.variant!r}, and no part in {folder} has weights of that name")
    return found


def conversion(config: "DiffusersConfig", pickles: OnlyPickles) -> str:
    """Return the command that writes the same model with safetensors, and what to do with the result."""
    keys = {**config.loading, **({"variant": pickles.variant} if pickles.variant else {})}
    source, target = str(config.folder() if config.folder().exists() else config.model), "MODEL"
    arguments = ", ".join([repr(source), *(f"{name}={value!r}" for name, value in keys.items())])
    program = f"from diffusers import {config.pipeline_class} as P; P.from_pretrained({arguments}).save_pretrained('{target}')"
    return f'`python -c "{program}"`, and set policy.model to the folder {target}'


def loaded_files(config: "DiffusersConfig", folder: Path, role: str, texts: bool = True) -> list[str]:
    """Return the files below `folder` that a role loads; with configurations and vocabularies if `texts`.

    Raises:
        PartNotThere: Weights are missing.
    """
    weights, files = part_weights(config, folder, role), []
    for part in known_parts(config, role):
        names = weights[part].files if part in weights else ()
        files += [f"{part}/{name}" for name in (*names, *(text_files(folder, part) if texts else ()))]
    return files


def _load_folder(config: "DiffusersConfig", pipeline_class: Any, folder: Path, role: str) -> Any:
    """Check the folder and its files, then load the parts one by one."""
    check_folder(config, folder, role)
    weights = part_weights(config, folder, role)
    for name in loaded_files(config, folder, role):
        check_file(folder / name)
    parts = {part: load_part(config, folder, part, found) for part, found in weights.items()}
    others = {**config.loading, **unused_parts(config, pipeline_class, role)}
    return pipeline_class.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False, **{**others, **parts}
    )
