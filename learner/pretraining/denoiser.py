"""Train the embedded model's UNet and text encoder on latents, in processes that share each batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from ray_ddpo.learner.pretraining.autoencoder import load_autoencoder
from ray_ddpo.learner.pretraining.modules import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    save_pipeline,
)
from ray_ddpo.learner.pretraining.shared_training import SharedTraining, TrainingPlan, join_process_group

BATCH = 32
NO_CAPTION = 0.1  # of the captions are dropped, for guidance


@dataclass(frozen=True)
class Material:
    """The training data of the UNet, computed once."""

    latents: Float[Tensor, "drawings variants 4 16 16"]  # scaled to a standard deviation of 1
    captions: Int[Tensor, "drawings"]  # row in `token_ids`
    token_ids: Int[Tensor, "rows 16"]  # the last row is the empty caption
    weights: Float[Tensor, "drawings"]  # sampling weights

    def save(self, file: Path) -> None:
        """Write the four tensors."""
        save_file(vars(self), file)


class Denoiser(nn.Module):
    """UNet and text encoder in one module, so that their gradients are averaged together."""

    def __init__(self, words: list[str]):
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(build_tokenizer(words))
        # Fused attention has a slow backward pass on a CPU, and 64 tokens are few.
        self.unet.set_attn_processor(AttnProcessor())

    def forward(
        self, noised: Float[Tensor, "B 4 16 16"], timesteps: Int[Tensor, "B"], token_ids: Int[Tensor, "B 16"]
    ) -> Float[Tensor, "B 4 16 16"]:
        """Predict the noise in `noised`."""
        embeddings = self.text_encoder(token_ids)[0]
        with torch.autocast("cpu", torch.bfloat16):
            return self.unet(noised, timesteps, embeddings).sample.float()


class DenoiserTraining(SharedTraining):
    """The training of a UNet that predicts noise."""

    name: ClassVar[str] = "denoiser"

    def __init__(self, plan: TrainingPlan, words: list[str], material: Material):
        torch.manual_seed(plan.seed)
        self.live: Denoiser
        self.averaged: Denoiser
        super().__init__(plan, Denoiser(words))
        self.words, self.material = words, material
        self.alphas_cumprod = build_scheduler().alphas_cumprod

    def loss(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the mean squared error of the noise (Ho et al. 2020, eq. 14)."""
        clean, token_ids = sample_batch(self.material, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(self.alphas_cumprod), (BATCH,), generator=generator)
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        mine = self.share()
        inputs = noised[mine].contiguous(memory_format=torch.channels_last), timesteps[mine], token_ids[mine]
        return (self.shared(*inputs) - noise[mine]).square().mean()

    def save_pipeline(self) -> None:
        parts = {"unet": self.averaged.unet, "text_encoder": self.averaged.text_encoder}
        save_pipeline(parts | {"vae": load_autoencoder(self.plan.work)}, self.words, self.plan.output)


def sample_batch(
    material: Material, generator: torch.Generator
) -> tuple[Float[Tensor, "32 4 16 16"], Int[Tensor, "32 16"]]:
    """Sample latents and the token ids of their captions, some of which are dropped."""
    chosen = torch.multinomial(material.weights, BATCH, replacement=True, generator=generator)
    variants = torch.randint(material.latents.shape[1], (BATCH,), generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < NO_CAPTION
    captions = torch.where(dropped, len(material.token_ids) - 1, material.captions[chosen])
    return material.latents[chosen, variants], material.token_ids[captions]


def train_in_process(rank: int, plan: TrainingPlan, words: list[str]) -> None:
    """Train with the other processes until the last step. Each of `words` is one token."""
    join_process_group(rank, plan.workers)
    DenoiserTraining(plan, words, Material(**load_file(plan.work / "material.safetensors"))).run()
    distributed.destroy_process_group()
