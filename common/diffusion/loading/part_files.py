"""Load one part of a pipeline from the files that its library chooses, and check it against the loading report."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ddpo.common.diffusion.host_loading import may_leave_unread
from ray_ddpo.common.diffusion.loading.library_errors import library_errors
from ray_ddpo.common.diffusion.loading.model_index import (
    PartNotThere,
    known_parts,
    read_class,
    read_object,
    with_article,
)
from ray_ddpo.common.diffusion.loading.unread_network import unread_network
from ray_ddpo.common.model_files.file_faults import DamagedFile, check_file, refuse_not_finite
from ray_ddpo.common.model_files.pretrained import weights_fault

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
TEXT_FILES = ("json", "txt", "model")  # configurations and vocabularies
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")  # pickles
SHARD = re.compile(r"-\d{5}-of-\d{5}")  # in a shard's file name
SHOWN = 6  # file names in a message


class OnlyPickles(PartNotThere):
    """A part's weights are pickles only. `variant` is the variant of all of them, or None."""

    def __init__(self, text: str, variant: str | None) -> None:
        super().__init__(text)
        self.variant = variant


@dataclass(frozen=True)
class PartWeights:
    """A part's weights: their variant, as `from_pretrained` takes it, and the files in the part's folder."""

    variant: str | None
    files: tuple[str, ...]


def weights_of(folder: Path, part: str, library: str, wanted: str | None) -> PartWeights:
    """Return the weights that `library` loads a part from. As in diffusers, a part may lack the `wanted` variant.

    Raises:
        PartNotThere: The files are missing, or there are several variants and none is requested.
    """
    if not (folder / part).is_dir():
        raise PartNotThere(f"there is no folder {part} in {folder}")
    names = sorted(path.name for path in (folder / part).iterdir())
    variant = _variant(folder, part, names, STEMS[library], wanted)
    suffix = f".{variant}" if variant else ""
    single, index = f"{STEMS[library]}{suffix}.safetensors", f"{STEMS[library]}.safetensors.index{suffix}.json"
    first, second = (index, single) if library == "diffusers" else (single, index)  # each library's own order
    chosen = first if first in names else second
    if chosen == single:
        return PartWeights(variant, (single,))
    return PartWeights(variant, (index, *_shards(folder, part, index, names)))


def _variant(folder: Path, part: str, names: list[str], stem: str, wanted: str | None) -> str | None:
    """Return the variant to load a part from; None for its usual files."""
    forms = rf"{stem}(?:\.([^.]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([^.]+))?\.json"
    matches = [found for name in names if (found := re.fullmatch(forms, name)) and not SHARD.search(name)]
    there = sorted({found[1] or found[2] or "" for found in matches})
    if wanted in there:
        return wanted
    if "" in there:
        return None
    if not there:
        raise _nothing(folder, part, names, stem)
    if wanted is None and len(there) == 1:
        return there[0]
    asked = f"policy.variant is {wanted!r}" if wanted else "policy.variant is not set"
    raise PartNotThere(f"its {part} has only the variants {there}, and {asked}: set policy.variant to one of them")


def _nothing(folder: Path, part: str, names: list[str], stem: str) -> PartNotThere:
    """Return the error for a part without safetensors files."""
    pickles = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    weights = [name for name in names if name.endswith(".safetensors")]
    if pickles and not weights:
        middles = [name.split(".")[1:-1] for name in pickles if ".index." not in name]  # "fp16" in model.fp16.bin
        variants = {SHARD.sub("", middle[0]) if middle else None for middle in middles}
        text = f"its {part} has only {pickles[0]}, a pickle, and pickles are not opened"
        return OnlyPickles(text, variants.pop() if len(variants) == 1 else None)
    found = ", ".join(weights or names)[:200] or "nothing"
    return PartNotThere(f"there is no {stem}.safetensors in {folder / part}; there is: {found}")


def _shards(folder: Path, part: str, index: str, names: list[str]) -> list[str]:
    """Return the files that an index names. Raise ValueError if one is missing, or if the file is no index."""
    path = folder / part / index
    check_file(path)
    found = json.loads(path.read_bytes())
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise DamagedFile(path, "it must have a weight_map of file names")
    if not isinstance(found.get("metadata"), dict):  # both libraries need it
        raise DamagedFile(path, 'it must have a metadata object, such as {"metadata": {}, "weight_map": …}')
    shards = sorted(set(table.values()))
    if lacking := [name for name in shards if name not in names]:
        said = f"{', '.join(lacking[:SHOWN])}, {len(lacking)} of the {len(shards)} files that {index} names"
        raise PartNotThere(f"{folder / part} lacks {said}")
    return shards


def text_files(folder: Path, part: str) -> list[str]:
    """Return the names of a part's configurations and vocabularies."""
    there = (folder / part).iterdir() if (folder / part).is_dir() else ()
    return sorted(path.name for path in there if path.suffix[1:] in TEXT_FILES and ".index." not in path.name)


def load_part(config: "DiffusersConfig", folder: Path, part: str, weights: PartWeights) -> Any:
    """Return a network, decoder or text encoder. Raise ValueError if a weight is missing or does not fit."""
    import diffusers
    import transformers

    of_diffusers, name = known_parts(config)[part].library == "diffusers", read_class(folder, part)
    library: Any = diffusers if of_diffusers else transformers
    dtype = {"torch_dtype" if of_diffusers else "dtype": config.loaded_dtype}
    keys = read_object(folder / part / "config.json")
    with library_errors(None, f"its {part} cannot be made as {part}/config.json says", keys):
        if may_leave_unread() and part == config.trained_part:
            network = unread_network(getattr(library, name), folder / part, weights.files, config.loaded_dtype)
            if network is not None:
                return network
        model, found = getattr(library, name).from_pretrained(
            str(folder / part),
            variant=weights.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported together below
            **dtype,
        )
    # A text encoder's file may hold more than the encoder. In a network or decoder, extra weights mean another model.
    if fault := weights_fault(found, refuse_unexpected=of_diffusers):
        raise ValueError(f"its {part}, {with_article(name)}, cannot be loaded ({fault})")
    refuse_not_finite(folder / part, model.state_dict())
    return model
