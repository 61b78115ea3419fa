"""Train the embedded model's UNet and text encoder on latents, in processes that share each batch."""

import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, Int
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ray_ddpo.learner.pretraining.autoencoder import load_autoencoder
from ray_ddpo.learner.pretraining.modules import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    save_pipeline,
)
from ray_ddpo.learner.pretraining.training_state import TrainingProgress, load_training, save_training

BATCH = 32
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 100
EMA_DECAY = 0.999
NO_CAPTION = 0.1  # of the captions are dropped, for guidance
STEPS_A_LOSS = 50
SECONDS_A_SNAPSHOT = 180


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


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a training, for every process."""

    words: list[str]  # each is one token
    steps: int
    seed: int
    workers: int
    work: Path  # folder of state, material and autoencoder
    output: Path  # folder of the pipeline


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


class DenoiserTraining:
    """The denoiser in training, and its moving average, which is saved. Every process has the same."""

    def __init__(self, plan: TrainingPlan, material: Material):
        torch.manual_seed(plan.seed)
        self.plan, self.material, self.progress = plan, material, TrainingProgress()
        self.live = Denoiser(plan.words)
        self.averaged = copy.deepcopy(self.live).requires_grad_(False)
        self.shared = DistributedDataParallel(self.live)
        self.optimizer = torch.optim.AdamW(self.live.parameters(), LEARNING_RATE, fused=True)
        self.alphas_cumprod = build_scheduler().alphas_cumprod
        self.modules = {"live": self.live, "averaged": self.averaged}

    def learning_rate(self) -> float:
        """Return the learning rate: linear warm-up, then cosine decay to zero."""
        step, steps = self.progress.step, self.plan.steps
        return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2

    def update(self) -> float:
        """Make an optimizer step, and return its loss: the mean squared error of the noise (Ho et al. 2020, eq. 14)."""
        # A generator for each step, so that a resumed training has the same random numbers as an uninterrupted one.
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.progress.step)
        clean, token_ids = sample_batch(self.material, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(self.alphas_cumprod), (BATCH,), generator=generator)
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        mine = slice(distributed.get_rank(), None, self.plan.workers)
        inputs = noised[mine].contiguous(memory_format=torch.channels_last), timesteps[mine], token_ids[mine]
        loss = (self.shared(*inputs) - noise[mine]).square().mean()
        loss.backward()
        self._step()
        return loss.item()

    def _step(self) -> None:
        """Apply the gradients, and update the moving average."""
        nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A small decay at first, so that the random initial weights are soon forgotten.
        decay = min(EMA_DECAY, (1 + self.progress.step) / (10 + self.progress.step))
        live = [parameter.detach() for parameter in self.live.parameters()]
        torch._foreach_lerp_(list(self.averaged.parameters()), live, 1 - decay)
        self.progress.step += 1


def sample_batch(
    material: Material, generator: torch.Generator
) -> tuple[Float[Tensor, "32 4 16 16"], Int[Tensor, "32 16"]]:
    """Sample latents and the token ids of their captions, some of which are dropped."""
    chosen = torch.multinomial(material.weights, BATCH, replacement=True, generator=generator)
    variants = torch.randint(material.latents.shape[1], (BATCH,), generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < NO_CAPTION
    captions = torch.where(dropped, len(material.token_ids) - 1, material.captions[chosen])
    return material.latents[chosen, variants], material.token_ids[captions]


def train_in_process(rank: int, plan: TrainingPlan) -> None:
    """Train with the other processes until the last step. Rank 0 shows progress and saves every few minutes."""
    # One thread a process: with several, every small operation waits for the slowest thread.
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29541")}
    distributed.init_process_group("gloo", rank=rank, world_size=plan.workers)
    training = DenoiserTraining(plan, Material(**load_file(plan.work / "material.safetensors")))
    if (plan.work / "training.safetensors").exists():
        training.progress = load_training(plan.work, training.modules, training.optimizer)
    distributed.barrier()
    started, saved = time.monotonic() - training.progress.seconds, time.monotonic()
    recent: list[float] = []
    with Progress(disable=rank > 0) as bar:
        task = bar.add_task("denoiser", total=plan.steps, completed=training.progress.step)
        while training.progress.step < plan.steps:
            recent.append(training.update())
            bar.advance(task)
            if training.progress.step % STEPS_A_LOSS == 0 and rank == 0:
                _note(training.progress, recent, started, bar)
                if time.monotonic() - saved > SECONDS_A_SNAPSHOT or training.progress.step >= plan.steps:
                    _save(training)
                    saved = time.monotonic()
    distributed.destroy_process_group()


def _note(progress: TrainingProgress, recent: list[float], started: float, bar: Progress) -> None:
    progress.seconds = time.monotonic() - started
    progress.losses.append(sum(recent) / len(recent))
    recent.clear()
    bar.console.print(
        f"denoiser step {progress.step}: loss {progress.losses[-1]:.4f}, {progress.seconds / 60:.1f} minutes"
    )


def _save(training: DenoiserTraining) -> None:
    plan = training.plan
    save_training(plan.work, training.modules, training.optimizer, training.progress)
    parts = {"unet": training.averaged.unet, "text_encoder": training.averaged.text_encoder}
    save_pipeline(parts | {"vae": load_autoencoder(plan.work)}, plan.words, plan.output)
