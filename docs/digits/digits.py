"""The keys of a family of models that draw digits, for `name = "digits:Digits"` in a recipe's `[policy]`."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from digits_policy import DIGITS, DigitsPolicy, call_network, pictures_of
from pydantic import Field
from torch import Tensor

from common.diffusion.live_bytes import line_through, peak_bytes
from common.diffusion.lora import LoraSettings, make_trainable, trained_parameters
from common.diffusion.meta_device import library_bytes
from common.diffusion.network_memory import Inputs, NetworkMemory
from common.diffusion.policy import PolicyConfig, Role, quiet_libraries
from common.diffusion.sizes import DeviceKind, PolicySizes, count_parameters, parameter_bytes
from common.model_hub import Weights
from common.recipe_tables import SamplingTable


class Digits(PolicyConfig):
    """`model`: a folder with a network, as `pretrain_digits.py` writes it."""

    lora: LoraSettings = LoraSettings(rank=8, alpha=8, target_modules=("to_q", "to_k", "to_v", "to_out"))
    zoom: int = Field(default=4, ge=1)  # pixels of a picture, along a side, for one of the network's

    def folder(self) -> Path:
        """Where the network lies."""
        return Path(os.path.expanduser(self.model))

    def network_config(self) -> dict[str, Any]:
        """What the network is made with, from its file."""
        return json.loads((self.folder() / "config.json").read_text())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        size = self.network_config()["size"]
        return 1, size, size

    def guidance(self, sampling: SamplingTable) -> float | None:
        """The scale; None where the digit's branch is enough."""
        return None if sampling.guidance_scale == 1 else sampling.guidance_scale

    def check(self) -> None:
        if not (self.folder() / "config.json").is_file():
            raise ValueError(
                f"policy.model is {self.model!r}: there is no config.json in {self.folder()}; python pretrain_digits.py "
                "makes such a folder"
            )
        if {self.dtype_of("sampler"), self.dtype_of("learner")} != {torch.float32} or self.gradient_checkpointing:
            raise ValueError(
                "policy.dtype, sampler_dtype and gradient_checkpointing are for large networks: this one computes in "
                "float32 and keeps its activations"
            )

    def noisy_steps(self, sampling: SamplingTable) -> int:
        return sampling.num_steps - 1  # the last one leads to the picture

    def needs(self) -> tuple[Weights, ...]:
        return (Weights(str(self.folder()), ("config.json", "*.safetensors"), "policy.model"),)

    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        quiet_libraries()
        from digit_transformer import DigitTransformer

        with torch.device("meta"):  # nothing is loaded, and nothing computed
            network: Any = DigitTransformer.from_config(self.network_config())
        parameters = count_parameters(network)
        make_trainable(network, self.train, self.lora)
        trained = sum(parameter.numel() for parameter in trained_parameters(network).values())
        shapes: dict[str, tuple[int, ...]] = {"digit": (len(DIGITS),)}
        inputs = Inputs(call_network, self.latent_shape, shapes, 1 if self.guidance(sampling) is None else 2)
        memory = NetworkMemory(network, inputs, torch.float32, device)
        held = parameter_bytes(network) + library_bytes(device)
        path = 4 * (sampling.num_steps + 1) * math.prod(self.latent_shape)  # bytes of all latents of an image
        return PolicySizes(
            latent_shape=self.latent_shape,
            noisy_steps=self.noisy_steps(sampling),
            conditioning_shape=shapes | {"negative_digit": (len(DIGITS),)},
            conditioning_bytes=4 * len(DIGITS),
            network_parameters=parameters,
            trained_parameters=trained,
            learner=memory.learning(checkpointing=False).plus(held + 3 * 4 * trained),  # gradient, AdamW's two moments
            drawing=memory.drawing().plus(held, 3 * path),
            decoding=line_through(lambda images: peak_bytes(lambda: self._decoded(images)), 1, 2).plus(held, path),
            encoding_bytes=held,
        )

    def _decoded(self, images: int) -> Tensor:
        return pictures_of(torch.empty(images, *self.latent_shape, device="meta"), self.zoom)

    def load(self, device: str, sampling: SamplingTable, role: Role) -> DigitsPolicy:
        quiet_libraries()
        from digit_transformer import DigitTransformer

        self.check()
        network = DigitTransformer.from_pretrained(self.folder(), use_safetensors=True)
        return DigitsPolicy(self, network, device, sampling, role)
