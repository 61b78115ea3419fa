"""The aesthetic head: from a CLIP image embedding to a rating of about 1 to 10, in every published layout."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ray_ddpo.common.image_models.weight_file import read_weight_file

Layer = tuple[Float[Tensor, "_ _"], Float[Tensor, "_"]]  # weight [out, in] and bias [out]

# The positions of layers with weights tell whether only dropout was between them, or ReLU too.
WITHOUT_ACTIVATIONS = ((), (0, 2, 4, 6, 7))
WITH_RELU = ((0, 3, 6, 9, 11),)
LAYOUTS = (
    "one layer ('weight', 'bias'), layers.0, 2, 4, 6, 7 ('layers.0.weight', …) without activations, "
    "or layers.0, 3, 6, 9, 11 with ReLU between them"
)


@dataclass(frozen=True)
class AestheticHead:
    """Layers with ReLU between them. A head without activations is one affine map, and is stored as one layer."""

    layers: tuple[Layer, ...]

    @property
    def dimension(self) -> int:
        """Return the dimension of the embeddings that the head rates."""
        return self.layers[0][0].shape[1]

    def to(self, device: str) -> "AestheticHead":
        return AestheticHead(tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers))

    def __call__(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Return the ratings of embeddings with L2 norm 1."""
        values = embeddings
        for weight, bias in self.layers[:-1]:
            values = torch.relu(linear(values, weight, bias))
        return linear(values, *self.layers[-1]).squeeze(-1)


def affine_map(layers: tuple[Layer, ...]) -> Layer:
    """Collapse layers without activations between them into one layer."""
    weight, bias = (tensor.double() for tensor in layers[0])
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight.double() @ weight, next_weight.double() @ bias + next_bias.double()
    return weight.float(), bias.float()


def read_head(path: str | Path) -> AestheticHead:
    """Read a head, in float32. Raise ValueError if the file is missing or unreadable, or has no published layout."""
    weights = read_weight_file(path, "the aesthetic head")
    layers = layers_in_order(weights)
    if layers is None:
        held = type(weights).__name__
        if isinstance(weights, dict):
            held = ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in weights.items())
        raise ValueError(f"the aesthetic head {path} has the weights {held}: it must have {LAYOUTS}")
    return AestheticHead(layers)


def layers_in_order(weights: Any) -> tuple[Layer, ...] | None:
    """Return the layers if `weights` has a published layout, collapsed if it has no activations; otherwise None."""
    if not isinstance(weights, dict):
        return None
    numbers = [re.fullmatch(r"layers\.(\d+)\.(weight|bias)", name) for name in weights]
    positions = tuple(sorted({int(number[1]) for number in numbers if number}))
    prefixes = [f"layers.{position}." for position in positions] or [""]
    if set(weights) != {prefix + part for prefix in prefixes for part in ("weight", "bias")}:
        return None
    layers = tuple((weights[f"{prefix}weight"].float(), weights[f"{prefix}bias"].float()) for prefix in prefixes)
    if positions not in WITHOUT_ACTIVATIONS + WITH_RELU or not _fit_together(layers):
        return None
    return (affine_map(layers),) if positions in WITHOUT_ACTIVATIONS else layers


def _fit_together(layers: tuple[Any, ...]) -> bool:
    matrices = all(weight.ndim == 2 and bias.shape == weight.shape[:1] for weight, bias in layers)
    chained = matrices and all(after.shape[1] == before.shape[0] for (before, _), (after, _) in pairwise(layers))
    return chained and layers[-1][0].shape[0] == 1
