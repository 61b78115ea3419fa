"""A linear classifier over image features, and its file format."""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier: logits are weight @ features + bias."""

    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, "classes"]
    classes: list[str]  # one per logit

    def logits(self, features: Float[Tensor, "B features"]) -> Float[Tensor, "B classes"]:
        """Return the unnormalized log-probabilities."""
        return features @ self.weight.T + self.bias


def save_probe(probe: LinearProbe, file: Path) -> None:
    """Write float32 tensors, with the class names in the file's metadata."""
    save_file({"weight": probe.weight, "bias": probe.bias}, file, {"classes": json.dumps(probe.classes)})


def load_probe(file: Path) -> LinearProbe:
    """Read what `save_probe` wrote."""
    with safe_open(file, "pt") as tensors:
        classes = json.loads(tensors.metadata()["classes"])
        return LinearProbe(tensors.get_tensor("weight"), tensors.get_tensor("bias"), classes)
