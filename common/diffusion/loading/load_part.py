"""Load one part of a pipeline, checked against its loading report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.diffusion.loading.library_errors import library_errors
from ray_ddpo.common.diffusion.loading.model_index import known_parts, read_class, read_object, with_article
from ray_ddpo.common.diffusion.loading.part_files import PartWeights
from ray_ddpo.common.model_files.file_faults import refuse_not_finite
from ray_ddpo.common.model_files.pretrained import weights_fault

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig


def load_part(config: "DiffusersConfig", folder: Path, part: str, weights: PartWeights) -> Any:
    """Return a network, decoder or text encoder.

    Raises:
        ValueError: Its file lacks a weight, or has a weight that does not fit.
    """
    import diffusers
    import transformers

    known = known_parts(config)[part]
    library: Any = diffusers if known.library == "diffusers" else transformers
    name = read_class(folder, part)
    cls = getattr(library, name)
    dtype = {"torch_dtype" if known.library == "diffusers" else "dtype": config.loaded_dtype}
    keys = read_object(folder / part / "config.json")
    with library_errors(None, f"its {part} cannot be made as {part}/config.json says", keys):
        model, found = cls.from_pretrained(
            str(folder / part),
            variant=weights.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported together below
            **dtype,
        )
    # A text encoder's file may hold more than the encoder. Unexpected weights for a network or decoder mean another model.
    fault = weights_fault(found, refuse_unexpected=known.library == "diffusers")
    if fault:
        raise ValueError(f"its {part}, {with_article(name)}, cannot be loaded ({fault})")
    refuse_not_finite(folder / part, model.state_dict())
    return model
