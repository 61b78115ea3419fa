"""Find the files of `policy.model` that a role reads, check them, and load a diffusers pipeline from them."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.diffusion.loading.model_index import (
    INDEX,
    PartNotThere,
    about_folder,
    about_model,
    check_folder,
    conversion,
    known_parts,
)
from ray_ddpo.common.diffusion.loading.part_files import (
    TEXT_FILES,
    OnlyPickles,
    PartWeights,
    load_part,
    text_files,
    weights_of,
)
from ray_ddpo.common.diffusion.loading.single_file import (
    check_single_file,
    load_single_file,
    names_a_file,
    single_file,
)
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.model_files.file_faults import check_file
from ray_ddpo.common.model_files.model_hub import (
    Weights,
    first_line,
    folder_here,
    is_hub_name,
    read_from_hub,
)
from ray_ddpo.common.runtime import undisturbed

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig


def source_of(config: "DiffusersConfig") -> str:
    """Return the folder or hub name that has the parts' configurations."""
    return (config.single_file_config or config.model) if names_a_file(config.model) else config.model


def check_model(config: "DiffusersConfig", role: str) -> None:
    """Raise ValueError if it can be told without loading the model that a role cannot load it."""
    is_a_file, folder, source = names_a_file(config.model), config.folder(), source_of(config)
    if is_a_file:
        check_single_file(config)
    elif config.single_file_config:
        raise ValueError(
            f"policy.single_file_config is {config.single_file_config!r}, and policy.model, {config.model!r}, is no "
            ".safetensors file: leave it out, a folder has its own configurations"
        )
    if not folder.exists() and is_hub_name(source) and not source.startswith((".", "/", "~")):
        return
    if not (folder / INDEX).is_file():
        key, embedded = ("single_file_config", "") if is_a_file else ("model", f" or one of {sorted(EMBEDDED_MODELS)}")
        raise ValueError(
            f"policy.{key} is {source!r}: there is no {INDEX} in {folder}; give a folder in diffusers' format, a hub "
            f"name (owner/model){embedded}"
        )
    with about_folder(config):
        check_folder(config, folder, role)
        models = [part for part, known in known_parts(config, role).items() if known.kind == "model"]
        files = [path for part in models for path in (folder / part).iterdir()]
        # Configurations alone are enough for a plan.
        if not is_a_file and any(path.suffix[1:] not in TEXT_FILES for path in files):
            part_weights(config, folder, role)


def files_by_role(config: "DiffusersConfig", role: str, texts: bool = True) -> tuple[Weights, ...]:
    """Return the files that a role reads: by name if the model is on this machine, otherwise by patterns.

    Configurations and vocabularies are among them if `texts`.
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
            files = _loaded_files(config, folder, role, texts)
    return (Weights(source, (INDEX, *files), "policy.model"),)


def load_pipeline(config: "DiffusersConfig", role: str) -> Any:
    """Return the pipeline with the parts that `role` needs. The other parts are None.

    Raises:
        ValueError: A file or a weight is missing, or is not what its name says.
    """
    import diffusers

    pipeline_class: Any = getattr(diffusers, config.pipeline_class)
    modules, _ = pipeline_class._get_signature_keys(pipeline_class)
    unused = dict.fromkeys(sorted(set(modules) - set(known_parts(config, role))))  # `from_pretrained` leaves out None
    try:
        if names_a_file(config.model):
            return load_single_file(config, pipeline_class, role, unused)
        folder = config.folder()
        if not folder.exists():
            folder = _downloaded(config, pipeline_class, role, unused)
        with about_model(config.model):
            return _load_folder(config, pipeline_class, folder, role, unused)
    except OSError as error:
        raise ValueError(f"policy.model is {config.model!r}, which cannot be loaded ({first_line(error)})") from error


def _downloaded(config: "DiffusersConfig", pipeline_class: Any, role: str, unused: dict[str, None]) -> Path:
    """Return the folder of a hub repository, which is downloaded if it is not in the cache."""

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


def part_weights(config: "DiffusersConfig", folder: Path, role: str) -> dict[str, PartWeights]:
    """Return the weights of each part that a role loads. Raise ValueError if they are missing."""
    models = {part: known for part, known in known_parts(config, role).items() if known.kind == "model"}
    try:
        found = {part: weights_of(folder, part, known.library, config.variant) for part, known in models.items()}
    except OnlyPickles as error:
        keys = {**config.loading, **({"variant": error.variant} if error.variant else {})}
        source = str(config.folder() if config.folder().exists() else config.model)
        arguments = ", ".join([repr(source), *(f"{name}={value!r}" for name, value in keys.items())])
        command = conversion(config, f"from_pretrained({arguments})")
        raise PartNotThere(f"{error}: convert it where you trust its source, with {command}") from error
    if config.variant and role == "sampler" and all(each.variant != config.variant for each in found.values()):
        raise PartNotThere(f"policy.variant is {config.variant!r}, and no part in {folder} has weights of that name")
    return found


def _loaded_files(config: "DiffusersConfig", folder: Path, role: str, texts: bool = True) -> list[str]:
    """Return the files below `folder` that a role loads; with configurations and vocabularies if `texts`."""
    weights, files = part_weights(config, folder, role), []
    for part in known_parts(config, role):
        names = weights[part].files if part in weights else ()
        files += [f"{part}/{name}" for name in (*names, *(text_files(folder, part) if texts else ()))]
    return files


def _load_folder(
    config: "DiffusersConfig", pipeline_class: Any, folder: Path, role: str, unused: dict[str, None]
) -> Any:
    """Check the folder and its files, then load the parts one by one."""
    check_folder(config, folder, role)
    weights = part_weights(config, folder, role)
    for name in _loaded_files(config, folder, role):
        check_file(folder / name)
    frozen = {part: weights.pop(part) for part in config.frozen_parts if part in weights}
    parts = {part: load_part(config, folder, part, found) for part, found in weights.items()}
    with undisturbed():  # adapters begin in a sampler, which has these networks, as in a learner
        parts |= {part: load_part(config, folder, part, found) for part, found in frozen.items()}
    others = {**config.loading, **unused, **parts}
    return pipeline_class.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False, **others
    )
