"""The keys of a model family that generates digits, for `name = "digits:Digits"` in a recipe's `[policy]`."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from digits_policy import DIGITS, DigitsPolicy, call_network, images_of
from pydantic import Field

from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.memory.network_memory import Inputs
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.network_sizes import network_sizes
from ray_ddpo.common.diffusion.policy import PolicyConfig, Role, quiet_libraries
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.recipe.tables import SamplingTable


class Digits(PolicyConfig):
    """`model`: a folder with a network, as `pretrain_digits.py` writes it."""

    takes_other_steps: ClassVar[bool] = True
    takes_sde: ClassVar[bool] = True

    lora: LoraSettings = LoraSettings(rank=8, alpha=8, target_modules=("to_q", "to_k", "to_v", "to_out"))
    zoom: int = Field(default=4, ge=1)  # pixels of an image, along a side, for one of the network's

    def folder(self) -> Path:
        """Return the network's folder."""
        return Path(os.path.expanduser(self.model))

    def network_config(self) -> dict[str, Any]:
        """Return the network's arguments, from its file."""
        return json.loads((self.folder() / "config.json").read_text())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return C, H, W of one image's latents."""
        size = self.network_config()["size"]
        return 1, size, size

    def guidance(self, sampling: SamplingTable) -> float | None:
        """Return the guidance scale; None without guidance."""
        return sampling.guidance_scale if sampling.is_guided else None

    def check(self) -> None:
        if not (self.folder() / "config.json").is_file():
            raise ValueError(
                f"policy.model is {self.model!r}: there is no config.json in {self.folder()}; python "
                "pretrain_digits.py makes such a folder"
            )
        if {self.dtype_of("sampler"), self.dtype_of("learner")} != {torch.float32} or self.gradient_checkpointing:
            raise ValueError(
                "policy.dtype, sampler_dtype and gradient_checkpointing are for large networks: this one computes in "
                "float32 and keeps its activations"
            )

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        return sampling.num_steps - 1  # the last one leads to the image

    def needs(self) -> tuple[Weights, ...]:
        return (Weights(str(self.folder()), ("config.json", "*.safetensors"), "policy.model"),)

    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        quiet_libraries()
        from digit_transformer import DigitTransformer

        with torch.device("meta"):  # nothing is loaded, and nothing computed
            network: Any = DigitTransformer.from_config(self.network_config())
        shapes: dict[str, tuple[int, ...]] = {"digit": (len(DIGITS),)}
        inputs = Inputs(call_network, self.latent_shape, shapes, 1 if self.guidance(sampling) is None else 2)
        return network_sizes(self, network, inputs, sampling, device, lambda latents: images_of(latents, self.zoom))

    def load(self, device: str, sampling: SamplingTable, role: Role) -> DigitsPolicy:
        quiet_libraries()
        from digit_transformer import DigitTransformer

        self.check()
        network = DigitTransformer.from_pretrained(self.folder(), use_safetensors=True)
        return DigitsPolicy(self, network, device, sampling, role)
