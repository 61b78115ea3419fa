"""A live network for digits: it encodes prompts, takes steps, and decodes images."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ray_ddpo.common.diffusion.compiled import CompiledNetwork
from ray_ddpo.common.diffusion.guidance import guided
from ray_ddpo.common.diffusion.lora.adapters import MergedAdapters
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, Role
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable, flow_match_table
from ray_ddpo.common.diffusion.trained_weights import restore_trained, save_trained
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.tables import SamplingTable

if TYPE_CHECKING:
    from digits import Digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_of(prompt: str) -> int:
    """Return the digit that a prompt names, as a word or a numeral.

    Raises:
        ValueError: The prompt names no digit, or several.
    """
    words = re.findall(r"[a-z]+|\d", prompt.lower())
    named = [DIGITS.index(word) if word in DIGITS else int(word) for word in words if word in DIGITS or word.isdigit()]
    if len(named) != 1:
        raise ValueError(f"the prompt {prompt!r} names {len(named)} digits: it must name one, such as 'seven' or '7'")
    return named[0]


def call_network(network: Any, latents: Tensor, timesteps: Tensor, digit: Tensor) -> Tensor:
    """Return the network's velocity prediction per row."""
    return network(latents, timesteps, digit)


def images_of(latents: Float[Tensor, "B 1 H W"], zoom: int) -> UInt8[Tensor, "B H2 W2 3"]:
    """Return images, white on black, with each latent as a square of `zoom` by `zoom` pixels."""
    grey = ((latents.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    large = grey.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    return large.permute(0, 2, 3, 1).repeat(1, 1, 1, 3)


class DigitsPolicy(Policy):
    """The policy of digits. Sampler and learner run the same numerics."""

    def __init__(self, config: "Digits", network: Any, device: str, sampling: SamplingTable, role: Role) -> None:
        self.config = config
        self.device = device
        self.network = network.to(device).eval()
        make_trainable(self.network, config.train, config.lora)
        self.merged = MergedAdapters(self.network) if config.merge_adapters and role != "learner" else None
        self.guidance_scale = config.guidance(sampling)
        self.num_steps = sampling.num_steps
        self.steps = self.denoising_steps(sampling)
        self.num_train_timesteps = self.steps.num_train_timesteps
        self.latent_shape = config.latent_shape
        self._compiled: CompiledNetwork | None = None

    def compile(self, batch_size: int) -> None:
        rows = batch_size * (1 if self.guidance_scale is None else 2)
        self._compiled = CompiledNetwork(lambda **inputs: call_network(self.network, **inputs), rows)

    @property
    def stochastic_steps(self) -> list[int]:
        return torch.nonzero(self.steps.std() > 0).flatten().tolist()

    def encode(self, prompts: list[str]) -> Conditioning:
        digits = torch.tensor([digit_of(prompt) for prompt in prompts], device=self.device)
        rows = F.one_hot(digits, len(DIGITS)).float()
        return {"digit": rows, "negative_digit": torch.zeros_like(rows[:1])}

    def initial_latents(self, noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return noise

    def denoising_steps(self, sampling: SamplingTable) -> FlowMatchTable:
        table = flow_match_table({}, sampling.num_steps, sampling.eta, 1, evenly_spaced=True, sde=sampling.sde)
        return table.to(self.device)

    def predict(
        self, latents: Float[Tensor, "B C H W"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "B C H W"]:
        return guided(self._predict, latents.float(), timesteps, conditioning, self.guidance_scale)

    def transition(
        self,
        latents: Float[Tensor, "B C H W"],
        steps: Int[Tensor, "B"],
        conditioning: Conditioning,
        stochastic: bool = True,
    ) -> Transition:
        velocity = self.predict(latents, self.steps.timesteps[steps], conditioning)
        return self.steps.transition(latents, velocity, steps, stochastic)

    def denoise(
        self,
        clean_latents: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B C H W"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        noised, timestep_input, target = self.steps.add_noise(clean_latents.float(), noise, timesteps)
        return self.predict(noised, timestep_input, conditioning), target

    def _predict(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        if self._compiled:
            return self._compiled(latents=latents, timesteps=timesteps, **rows)
        return call_network(self.network, latents, timesteps, **rows)

    def decode(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B H2 W2 3"]:
        return images_of(latents, self.config.zoom)

    def save(self, folder: Path) -> Path:
        return save_trained(self.network, self.config.train, self.config.lora, folder, "transformer")

    def restore(self, path: Path) -> None:
        restore_trained(self.network, self.config.train, path)
