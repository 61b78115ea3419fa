"""LoRA files: find them, read tensors and header, and refuse pickled, damaged or non-finite files."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_ddpo.common.model_files.file_faults import refuse_not_finite
from ray_ddpo.common.model_files.weight_files import SECOND_PART, TRAINED_PARTS, part_of
from ray_ddpo.common.reading import reading
from ray_ddpo.common.recipe.named_files import Weights

FILE_NAME = "pytorch_lora_weights.safetensors"  # diffusers' name
EXACT_NAME = "trained_adapter.safetensors"  # a second file, for alpha / rank that cannot be folded in without rounding
SECOND_NAME = f"{SECOND_PART}_lora.safetensors"  # the adapters of a second network alone, for diffusers
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # the header's key in which diffusers looks for rank and alpha
TRAINED = "trained_adapter_metadata"  # the header's key for rank and alpha in training
NETWORK = "trained_network"  # the header's key for the network's class
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OWN_KEYS = {"r", "lora_alpha", "target_modules"}
OWN_PATTERNS = {"rank_pattern", "alpha_pattern"}


@dataclass(frozen=True)
class LoraFile:
    """The contents of a LoRA file: tensors by name, and the settings in its header by `part.key`."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]  # settings that diffusers reads
    trained: dict[str, Any]  # settings in training, if alpha / rank is folded into the weights
    network: str = ""  # the class of the trained network, if the header has it

    @property
    def part(self) -> str | None:
        """Return the network's name in its pipeline, from the tensors' prefix; None if they have no prefix."""
        return next(filter(None, map(part_of, self.tensors)), None)

    @cached_property
    def is_ours(self) -> bool:
        """Return whether this program wrote the file: it has prefixed settings of one network, and no others."""
        if not all(name.startswith(f"{self.part}.") for name in self.metadata):
            return False
        keys = {name.removeprefix(f"{self.part}.") if self.part in TRAINED_PARTS else name for name in self.metadata}
        if not isinstance(self.own_settings.get("target_modules"), list):  # other programs may have a pattern there
            return False
        if self.trained:
            return OWN_KEYS <= keys <= OWN_KEYS | OWN_PATTERNS
        return keys == OWN_KEYS

    @property
    def own_settings(self) -> dict[str, Any]:
        """Return rank, alpha, target modules and patterns of one of this program's files, as in training."""
        return {name.removeprefix(f"{self.part}."): value for name, value in (self.trained or self.metadata).items()}

    def scale(self, module: str, trained: bool = False) -> float:
        """Return a module's alpha / rank, as PEFT finds it in the header, or as in training; 1 if there is none."""
        from peft.utils.other import get_pattern_key

        settings = (self.trained or self.metadata) if trained else self.metadata
        values = {name.removeprefix(f"{self.part}."): value for name, value in settings.items()}
        if not {"r", "lora_alpha"} <= values.keys():
            return 1.0
        ranks, alphas = values.get("rank_pattern", {}), values.get("alpha_pattern", {})
        rank = ranks.get(get_pattern_key(list(ranks), module), values["r"])
        return alphas.get(get_pattern_key(list(alphas), module), values["lora_alpha"]) / rank

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the network."""
        return {name.removeprefix(f"{self.part}."): value for name, value in self.tensors.items()}


def lora_file(path: Path) -> Path:
    """Find the LoRA file in a run's folder, in a LoRA's folder, or at the path itself.

    Raises:
        ValueError: There is none, there are several, or it is pickled.
    """
    names = (EXACT_NAME, FILE_NAME, PEFT_NAME)
    candidates = [folder / name for folder in (path / "lora", path) for name in names]
    found = next((candidate for candidate in (*candidates, path) if candidate.is_file()), None)
    if found is None:
        there = sorted(file for file in path.glob("*.safetensors") if file.is_file())
        if len(there) > 1:
            raise ValueError(f"{path} has {len(there)} safetensors files, such as {there[0].name}: name the LoRA's own")
        pickled = sorted(file for file in path.glob("*") if file.suffix in PICKLED)
        found = next(iter(there or pickled), None)
    if found is None:
        raise ValueError(f"{path} is no run with a LoRA, no folder with {FILE_NAME}, and no LoRA file")
    if found.suffix in PICKLED:
        raise ValueError(
            f"{found} is pickled, and loading it could run a program: convert it to safetensors, with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE), and name that file"
        )
    if found.suffix != ".safetensors":
        raise ValueError(f"{found} is no LoRA file: its name must end in .safetensors")
    return found


def save_with_header(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file with deterministic bytes. The library writes a header's settings in random order."""
    save_file(tensors, path, header)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def files_of_lora(path: str) -> Weights:
    """Return the files at `policy.lora.path`, to be fingerprinted. Raise ValueError if there are none."""
    try:
        file = lora_file(Path(os.path.expanduser(path)))
    except ValueError as error:
        raise ValueError(f"policy.lora.path is {path!r}: {error}") from error
    beside = (PEFT_CONFIG,) if (file.parent / PEFT_CONFIG).is_file() else ()
    return Weights(str(file.parent.absolute()), (file.name, *beside), "policy.lora.path")


def holds_lora(path: Path) -> bool:
    """Return whether a path holds a LoRA file rather than a full network."""
    names = (FILE_NAME, PEFT_NAME, f"lora/{FILE_NAME}")
    return path.is_file() or any((path / name).is_file() for name in names)


def read_lora_file(path: Path) -> LoraFile:
    """Read a LoRA file.

    Raises:
        ValueError: The file is not safetensors, is empty, or has non-finite numbers.
    """
    file = lora_file(path)
    with reading(file):
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        metadata, trained = (json.loads(header.get(key, "{}")) for key in (METADATA, TRAINED))
        if not all(isinstance(each, dict) for each in (metadata, trained)):
            raise ValueError(f"{METADATA} in its header is no JSON object")
    if not tensors:
        raise ValueError(f"the LoRA {file} holds no tensor")
    refuse_not_finite(file, tensors)
    for settings in (metadata, trained):
        for key, value in settings.items():
            is_number = isinstance(value, int | float) and bool(value) and math.isfinite(value)
            if key.rpartition(".")[2] in ("r", "lora_alpha") and not is_number:
                said = f"{key} = {value!r} in its header: it must be a number other than 0"
                raise ValueError(f"the LoRA {file} has {said}")
    return LoraFile(file, tensors, metadata, trained, header.get(NETWORK, ""))


def refuse_settings(path: Path, metadata: Mapping[str, Any], part: str) -> None:
    """Raise ValueError if diffusers cannot read a part's settings, from a LoRA's header or from the file next to it."""
    of_part = {name.removeprefix(f"{part}."): value for name, value in metadata.items() if name.startswith(f"{part}.")}
    if metadata and not of_part:
        raise ValueError(
            f"the LoRA {path} has settings for {part} under other names, such as {min(metadata)}: diffusers looks for "
            f"{part}.r, {part}.lora_alpha and {part}.target_modules; rename them, or leave out the header for "
            "strength 1"
        )
    if metadata and not of_part.get("target_modules"):
        raise ValueError(
            f"the LoRA {path} has settings for {part} without target_modules: diffusers needs the names of the layers"
        )
    if kept := of_part.get("modules_to_save"):
        raise ValueError(
            f"the LoRA {path} has modules_to_save = {kept!r}: full layers next to the adapters, which diffusers does "
            "not load"
        )
