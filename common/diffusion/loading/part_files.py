"""Find the files that a part of a pipeline is loaded from, as diffusers and transformers choose them.

Nothing is loaded.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ray_ddpo.common.model_files.file_faults import DamagedFile, check_file

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
TEXT_FILES = ("json", "txt", "model")  # configurations and vocabularies
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")  # pickles
SHARD = re.compile(r"-\d{5}-of-\d{5}")  # in a shard's file name
SHOWN = 6  # file names in a message


class PartNotThere(ValueError):
    """A part, or one of its files, is missing from a model's folder. The text says which, and what is there."""


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
    """Return the weights that `library` loads a part from.

    Args:
        folder: the model's folder, with one folder per part.
        part: the part's name.
        library: diffusers or transformers.
        wanted: the recipe's variant. As in diffusers, a part without it is loaded from its usual files.

    Raises:
        PartNotThere: The files are missing, or there are several variants and none is requested.
    """
    names = _names(folder, part)
    variant = _variant(folder, part, names, STEMS[library], wanted)
    single = f"{_with(variant, STEMS[library])}.safetensors"
    index = _with(variant, f"{STEMS[library]}.safetensors.index") + ".json"
    first, second = (index, single) if library == "diffusers" else (single, index)  # each library's own order
    chosen = first if first in names else second
    if chosen == single:
        return PartWeights(variant, (single,))
    return PartWeights(variant, (index, *_shards(folder, part, index, names)))


def _names(folder: Path, part: str) -> list[str]:
    if not (folder / part).is_dir():
        raise PartNotThere(f"there is no folder {part} in {folder}")
    return sorted(path.name for path in (folder / part).iterdir())


def _with(variant: str | None, name: str) -> str:
    return f"{name}.{variant}" if variant else name


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
        variants = {_middle(name) for name in pickles if ".index." not in name}
        text = f"its {part} has only {pickles[0]}, a pickle, and pickles are not opened"
        return OnlyPickles(text, variants.pop() if len(variants) == 1 else None)
    found = ", ".join(weights or names)[:200] or "nothing"
    return PartNotThere(f"there is no {stem}.safetensors in {folder / part}; there is: {found}")


def _middle(name: str) -> str | None:
    stem, *middle, _ = name.split(".")
    return SHARD.sub("", middle[0]) if middle else None


def _shards(folder: Path, part: str, index: str, names: list[str]) -> list[str]:
    """Return the files that an index names.

    Raises:
        PartNotThere: A file is missing.
        ValueError: The file is not an index.
    """
    path = folder / part / index
    check_file(path)
    found = json.loads(path.read_bytes())
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise DamagedFile(path, "it must have a weight_map of file names")
    if not isinstance(found.get("metadata"), dict):  # both libraries need it
        raise DamagedFile(path, 'it must have a metadata object, such as {"metadata": {}, "weight_map": …}')
    shards = sorted(set(table.values()))
    lacking = [name for name in shards if name not in names]
    if lacking:
        said = ", ".join(lacking[:SHOWN])
        raise PartNotThere(
            f"{folder / part} lacks {said}, {len(lacking)} of the {len(shards)} files that {index} names"
        )
    return shards


def text_files(folder: Path, part: str) -> list[str]:
    """Return the names of a part's configurations and vocabularies."""
    there = (folder / part).iterdir() if (folder / part).is_dir() else ()
    return sorted(path.name for path in there if path.suffix[1:] in TEXT_FILES and ".index." not in path.name)
