"""The tiny network as a policy that computes in float64 throughout, so that any remaining difference is a mistake."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, PolicyConfig, Role
from ray_ddpo.common.diffusion.trained_weights import restore_trained, save_trained
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import KEYS

STD = 0.3


class DoublePolicy(Policy):
    """A policy with simple steps in float64, because diffusion's own steps compute in float32."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.network = inner.network.double()
        self.device = inner.device
        self.num_steps = inner.num_steps
        self.num_train_timesteps = inner.num_train_timesteps
        self.latent_shape = inner.latent_shape

    def compile(self, batch_size: int) -> None:
        raise AssertionError("it is never compiled")

    @property
    def stochastic_steps(self) -> list[int]:
        return list(range(self.num_steps))

    def encode(self, prompts: list[str]) -> Conditioning:
        return self._inner.encode(prompts)

    def initial_latents(self, noise: Tensor) -> Tensor:
        return noise

    def _predicted(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows = {name: value.double() for name, value in conditioning.items() if not name.startswith("negative_")}
        return self._inner._call(latents=latents.double(), timesteps=timesteps, **rows)

    def transition(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, stochastic: bool = True
    ) -> Transition:
        timesteps = (self.num_steps - steps) * self.num_train_timesteps // (self.num_steps + 1)
        predicted = self._predicted(latents, timesteps, conditioning)
        std = torch.full((len(steps),), STD if stochastic else 0.0, dtype=torch.float64)
        return Transition(0.9 * latents.double() - 0.1 * predicted, std)

    def denoise(
        self, clean_latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        return self._predicted(0.5 * clean_latents + noise, timesteps, conditioning), noise.double()

    def decode(self, latents: Tensor) -> Tensor:
        return self._inner.decode(latents)

    def save(self, folder: Path) -> Path:
        config = self._inner.config
        return save_trained(self.network, config.train, config.lora, folder, config.network_name)

    def restore(self, path: Path) -> None:
        restore_trained(self.network, self._inner.config.train, path)


class Double(PolicyConfig):
    """The configuration; `model` is the folder of a tiny pipeline."""

    family: str = "stable_diffusion"

    def check(self) -> None:
        pass

    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        return self._single().sizes(sampling, device)

    def load(self, device: str, sampling: SamplingTable, role: Role) -> DoublePolicy:
        return DoublePolicy(self._single().load(device, sampling, role))

    def _single(self) -> DiffusersConfig:
        keys = {"model": self.model, "train": self.train, "gradient_checkpointing": self.gradient_checkpointing}
        return build(POLICIES, {"name": self.family, **keys, **KEYS.get(self.family, {})}, "policy", DiffusersConfig)
