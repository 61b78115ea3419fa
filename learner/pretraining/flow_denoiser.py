"""Train the transformer and the text encoders of the model that writes, by flow matching on latents."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_ddpo.learner.pretraining.autoencoder import load_autoencoder
from ray_ddpo.learner.pretraining.flow_modules import (
    SHIFT,
    build_letter_tokenizer,
    build_text_encoders,
    build_transformer,
    save_flow_pipeline,
)
from ray_ddpo.learner.pretraining.shared_training import SharedTraining, TrainingPlan, join_process_group

BATCH = 48
NO_CAPTION = 0.05  # of the captions are dropped, for guidance
UNIFORM = 0.3  # of the timesteps are uniform, the others logit-normal
SIGNS = 0.7  # of a batch; the others are shapes


@dataclass(frozen=True)
class FlowMaterial:
    """The training data of the transformer, computed once."""

    latents: Float[Tensor, "N 8 16 16"]  # scaled to a standard deviation of 1, in half precision
    token_ids: Int[Tensor, "N 16"]
    no_caption: Int[Tensor, "16"]
    signs: Int[Tensor, ""]  # the first images show signs, the others show shapes

    def save(self, file: Path) -> None:
        """Write the four tensors."""
        save_file(vars(self), file)


class FlowDenoiser(nn.Module):
    """Transformer and text encoders in one module, so that their gradients are averaged together."""

    def __init__(self):
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoders = nn.ModuleDict(build_text_encoders(build_letter_tokenizer()))

    def forward(
        self, noised: Float[Tensor, "B 8 16 16"], sigmas: Float[Tensor, "B"], token_ids: Int[Tensor, "B 16"]
    ) -> Float[Tensor, "B 8 16 16"]:
        """Predict the velocity, with the captions encoded as StableDiffusion3Pipeline encodes them."""
        encoded = [encoder(token_ids, output_hidden_states=True) for encoder in self.text_encoders.values()]
        embeddings = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        # One row of zeros in place of T5's output: max_sequence_length = 1.
        embeddings = nn.functional.pad(embeddings, (0, 0, 0, 1))
        pooled = torch.cat([each.text_embeds for each in encoded], dim=-1)
        # Fused attention has a slow backward pass on a CPU, and 81 tokens are few.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return self.transformer(noised, embeddings, pooled, 1000 * sigmas, return_dict=False)[0].float()


class FlowTraining(SharedTraining):
    """The training of a transformer that predicts velocities."""

    name: ClassVar[str] = "transformer"

    def __init__(self, plan: TrainingPlan, material: FlowMaterial):
        torch.manual_seed(plan.seed)
        self.live: FlowDenoiser
        self.averaged: FlowDenoiser
        super().__init__(plan, FlowDenoiser())
        self.material = material

    def loss(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the mean squared error of the velocity (Esser et al. 2024, section 2)."""
        clean, token_ids = sample_flow_batch(self.material, generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = sample_sigmas(BATCH, generator)
        at = sigmas.view(-1, 1, 1, 1)
        noised = (1 - at) * clean + at * noise
        mine = self.share()
        velocity = self.shared(noised[mine], sigmas[mine], token_ids[mine])
        return (velocity - (noise - clean)[mine]).square().mean()

    def save_pipeline(self) -> None:
        autoencoder = load_autoencoder(self.plan.work, AutoencoderKL)
        parts = {"transformer": self.averaged.transformer, "vae": autoencoder, **self.averaged.text_encoders}
        save_flow_pipeline(parts, self.plan.output)


def sample_sigmas(count: int, generator: torch.Generator) -> Float[Tensor, "count"]:
    """Sample noise levels: logit-normal (Esser et al. 2024, eq. 19), or uniform, and shifted towards noise (eq. 23)."""
    normal = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < UNIFORM, uniform, normal)
    return SHIFT * chosen / (1 + (SHIFT - 1) * chosen)


def sample_flow_batch(
    material: FlowMaterial, generator: torch.Generator
) -> tuple[Float[Tensor, "48 8 16 16"], Int[Tensor, "48 16"]]:
    """Sample latents and the token ids of their captions, some of which are dropped."""
    signs, total = int(material.signs), len(material.latents)
    is_sign = torch.rand(BATCH, generator=generator) < SIGNS
    place = torch.rand(BATCH, generator=generator)
    chosen = torch.where(is_sign, signs * place, signs + (total - signs) * place).long()
    dropped = torch.rand(BATCH, generator=generator) < NO_CAPTION
    return material.latents[chosen].float(), torch.where(
        dropped[:, None], material.no_caption, material.token_ids[chosen]
    )


def train_flow_in_process(rank: int, plan: TrainingPlan, compiled: bool) -> None:
    """Train with the other processes until the last step."""
    join_process_group(rank, plan.workers)
    training = FlowTraining(plan, FlowMaterial(**load_file(plan.work / "material.safetensors")))
    if compiled:
        training.live.transformer.compile()
    training.run()
    distributed.destroy_process_group()
