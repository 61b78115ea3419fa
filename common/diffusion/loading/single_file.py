"""Load a checkpoint that is a single file (Stability's own format, as on Civitai); configurations are in a folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.diffusion.loading.model_index import (
    FAMILIES,
    INDEX,
    PartNotThere,
    about_folder,
    about_model,
    check_folder,
    conversion,
    known_parts,
    read_class,
    read_object,
    with_article,
)
from ray_ddpo.common.diffusion.loading.part_files import TEXT_FILES, PartWeights, load_part, text_files, weights_of
from ray_ddpo.common.model_files.file_faults import check_file, refuse_not_finite
from ray_ddpo.common.model_files.model_hub import Weights, read_from_hub
from ray_ddpo.common.model_files.pretrained import weights_fault

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

SAFE, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
DECODERS = ("first_stage_model.", "vae.")  # prefixes of a decoder's weights
BY_REPOSITORY = {  # the repository that diffusers recognizes a file as → the pipeline that it loads
    "stable-diffusion-xl-base": "StableDiffusionXLPipeline",
    "stable-diffusion-3": "StableDiffusion3Pipeline",
    "FLUX.1-dev": "FluxPipeline",
    "FLUX.1-schnell": "FluxPipeline",
    "stable-diffusion-2-1": "StableDiffusionPipeline",
}
FALLBACK = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # diffusers' answer for files that it does not recognize, too


def names_a_file(model: str) -> bool:
    """Return whether `policy.model` names one file rather than a folder or a hub repository."""
    path = file_path(model)
    return path.is_file() or (path.suffix in (SAFE, *PICKLES) and not path.is_dir())


def file_path(model: str) -> Path:
    """Return the path that `policy.model` stands for."""
    return Path(os.path.expanduser(model))


def check_single_file(config: "DiffusersConfig") -> None:
    """Raise ValueError if a single file's name or header tells that it cannot be loaded."""
    path, example = file_path(config.model), next(iter(config.published), "the model's repository")
    command = conversion(config, f"from_single_file('{config.model}')")
    convert = f"convert it where the hub can be reached, with {command}"
    with about_model(config.model):
        if not path.is_file():
            raise ValueError("there is no such file")
        if config.pipeline_class in FAMILIES and config.pipeline_class not in BY_REPOSITORY.values():
            raise ValueError(
                "this family's models are not read from single files: give a folder in diffusers' format or a hub name, "
                f"such as '{example}'"
            )
        if path.suffix != SAFE:
            raise ValueError(f"it is no {SAFE} file, and pickles are not opened: {convert}")
        check_file(path)
        _check_kind(config, _names_and_shapes(path))
        if config.single_file_config is None:
            raise ValueError(
                "a single file has no configurations: set policy.single_file_config to a folder in diffusers' format "
                f"or a hub name that has those of the same architecture, such as '{example}'; or {convert}"
            )


def _names_and_shapes(path: Path) -> dict[str, Any]:
    """Return the file's weights on the meta device: names and shapes, from its header."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}


def _check_kind(config: "DiffusersConfig", names: dict[str, Any]) -> None:
    """Raise ValueError if the file is a LoRA, or a model of another family, as far as diffusers recognizes it."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    if any("lora_" in name for name in names):
        raise ValueError("this is a LoRA, and policy.model must be a full model")
    repository = fetch_diffusers_config(names)["pretrained_model_name_or_path"]
    if repository == FALLBACK:
        return
    found = next(
        (name for part, name in BY_REPOSITORY.items() if part in repository and "inpaint" not in repository), None
    )
    if found is None:
        raise ValueError(
            f"this is of the kind of {repository}, which no family here trains; the pipelines are {sorted(FAMILIES)}"
        )
    if found != config.pipeline_class:
        family, words = FAMILIES[found]
        raise ValueError(f'this is {with_article(words)} (of the kind of {repository}): policy.name must be "{family}"')


def load_single_file(config: "DiffusersConfig", pipeline_class: Any, role: str, absent: dict[str, None]) -> Any:
    """Return a single file's pipeline with the parts that `role` needs. Raise ValueError if a weight is missing."""
    path, folder = file_path(config.model), _config_folder(config)
    with about_folder(config):
        check_folder(config, folder, role)
    with about_model(config.model):
        beside = {
            part: load_part(config, folder, part, weights) for part, weights in _beside(config, folder, role).items()
        }
        names = _names_and_shapes(path)
        models = {part: known for part, known in known_parts(config, role).items() if known.kind == "model"}
        for part, known in models.items():
            if known.library == "diffusers" and part not in beside:
                _check_names(folder, part, names)
        given = {**config.loading, **absent, **beside}
        pipeline = pipeline_class.from_single_file(
            str(path), config=str(folder), local_files_only=True, dtype=config.loaded_dtype, **given
        )
        for part in models:
            model = getattr(pipeline, part)
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            # diffusers leaves weights that the file lacks on the meta device.
            if missing := sorted(name for name, tensor in tensors.items() if tensor.is_meta):
                fault = f"weights are missing: {missing[0]}, {len(missing)} in all"
                raise ValueError(f"its {part} cannot be loaded ({fault})")
            refuse_not_finite(f"{path}, its {part}", model.state_dict())
        return pipeline


def _check_names(folder: Path, part: str, names: dict[str, Any]) -> None:
    """Raise ValueError if names and shapes, as diffusers converts them, are not those of the part."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_model import (
        SINGLE_FILE_LOADABLE_CLASSES,
        _should_convert_state_dict_to_diffusers,
    )

    name, keys = read_class(folder, part), read_object(folder / part / "config.json")
    with torch.device("meta"):
        expected = getattr(diffusers, name).from_config(keys).state_dict()
    found = dict(names)
    if _should_convert_state_dict_to_diffusers(expected, found):
        try:
            found = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"](config=keys, checkpoint=found)
        except (KeyError, IndexError) as error:
            raise ValueError(f"its {part} cannot be loaded (weights are missing, such as {error})") from error
    shared = expected.keys() & found.keys()
    misfits = [(each,) for each in shared if expected[each].shape != found[each].shape]
    missing = expected.keys() - found.keys()
    if fault := weights_fault({"missing_keys": missing, "unexpected_keys": (), "mismatched_keys": misfits}):
        raise ValueError(f"its {part}, {with_article(name)}, cannot be loaded ({fault})")


def _config_folder(config: "DiffusersConfig") -> Path:
    """Return the folder of configurations. A hub repository is downloaded if it is not in the cache."""
    from huggingface_hub import snapshot_download

    if config.folder().is_dir():
        return config.folder()
    source, patterns = str(config.single_file_config), [f"*.{kind}" for kind in TEXT_FILES]

    def read(local_files_only: bool) -> Path:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=local_files_only))

    return read_from_hub(read, f"policy.single_file_config is {source!r}, which cannot be loaded")


def _beside(config: "DiffusersConfig", folder: Path, role: str) -> dict[str, PartWeights]:
    """Return the weights of parts that are not in the file. Many published files lack text encoders or decoder."""
    import transformers
    from diffusers.loaders import single_file_utils as utils

    names = _names_and_shapes(file_path(config.model))
    decoder = any(name.startswith(DECODERS) for name in names)
    found = {}
    for part, known in known_parts(config, role).items():
        if known.kind != "model" or part == config.network_name:
            continue
        if known.library == "diffusers":
            inside = decoder and read_class(folder, part) == "AutoencoderKL"
        elif "T5EncoderModel" in known.classes:
            inside = utils.is_t5_in_single_file(names)
        else:
            inside = utils.is_clip_model_in_single_file(getattr(transformers, known.classes[0]), names)
        if not inside:
            try:
                found[part] = weights_of(folder, part, known.library, config.variant)
            except PartNotThere as error:
                raise PartNotThere(f"the file has no {part}, and {error}") from error
    return found


def single_file(config: "DiffusersConfig", role: str) -> tuple[Weights, ...]:
    """Return the files that a role reads if the model is a single file."""
    path, source = file_path(config.model), config.single_file_config
    model = Weights(str(path.parent), (path.name,), "policy.model")
    if source is None:
        return (model,)
    folder, names = config.folder(), [INDEX]
    if not folder.is_dir():
        patterns = [f"{part}/*.{kind}" for part in known_parts(config, role) for kind in TEXT_FILES]
        return (model, Weights(source, (INDEX, *patterns), "policy.single_file_config"))
    beside = _beside(config, folder, role) if path.is_file() else {}
    for part in known_parts(config, role):
        files = beside[part].files if part in beside else ()
        names += [f"{part}/{name}" for name in (*files, *text_files(folder, part))]
    return (model, Weights(str(folder), tuple(names), "policy.single_file_config"))
