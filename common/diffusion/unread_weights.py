"""UnreadWeights: a network's weights that are still in their files, of which a rank reads only its shards."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_ddpo.common.model_files.file_faults import refuse_not_finite
from ray_ddpo.common.reading import reading

ADAPTED = ".base_layer."  # PEFT's mark in the name of a parameter whose layer has an adapter


@dataclass(frozen=True)
class UnreadWeights:
    """The safetensors file of each parameter that was not read, and the dtype that all of them are loaded in."""

    files: Mapping[str, Path]  # by the parameter's name in its file
    dtype: torch.dtype

    def stored_name(self, parameter: str) -> str | None:
        """Return the name in its file of a network's parameter; None if that is not among the unread ones."""
        name = parameter.replace(ADAPTED, ".")
        return name if name in self.files else None

    def read(self, wanted: Mapping[str, slice]) -> Iterator[tuple[str, Tensor]]:
        """Yield rows of the first axis of each of the `wanted` parameters, by their names in the files.

        Nothing else is read, and each tensor has memory of its own.

        Raises:
            ValueError: A file cannot be read, or some of these rows are not finite.
        """
        from safetensors import safe_open

        for file in sorted(set(self.files.values())):
            names = [name for name in wanted if self.files[name] == file]
            with reading(file), safe_open(file, "pt") as opened:
                for name in names:
                    rows = _rows(opened, name, wanted[name]).to(self.dtype, copy=True)
                    refuse_not_finite(file, {name: rows})
                    yield name, rows


def _rows(opened: Any, name: str, rows: slice) -> Tensor:
    """Return rows of a tensor in an open file. The library refuses a slice without rows, and one of a single number."""
    if rows == slice(None):
        return opened.get_tensor(name)
    stored = opened.get_slice(name)
    return stored[rows] if rows.start < rows.stop else torch.empty((0, *stored.get_shape()[1:]))


def without_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor of NaN that takes the memory of one number, for a weight that is read later."""
    return torch.full((), torch.nan, dtype=dtype).expand(shape)


def replace_parameter(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put another parameter in the place of the one that has this name."""
    place, _, leaf = name.rpartition(".")
    network.get_submodule(place)._parameters[leaf] = parameter
