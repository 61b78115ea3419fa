"""TRL's own DDPO on the rounds that a job describes: run in TRL's environment, it imports nothing of this project.

Usage: python trl_side.py FOLDER. Reads job.json and adapters.safetensors there and writes result.safetensors.
"""

import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from trl.core import randn_tensor
from trl.models import modeling_sd_base

randperm = torch.randperm


class SeededPipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline, with all of an image's noise from the image's own seed."""

    seeds: Iterator[list[int]]

    def __call__(self, *args: Any, **keys: Any) -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in next(self.seeds)]

        def step_noise(shape: tuple[int, ...], generator: None, **rest: Any) -> Tensor:
            return randn_tensor(shape, generator=generators, **rest)

        # TRL hands a generator to the first latents only: the noise of its steps is always torch's global one.
        with patch.object(modeling_sd_base, "randn_tensor", step_noise):
            return super().__call__(*args, generator=generators, **keys)


class WatchedTrainer(DDPOTrainer):
    """TRL's trainer in every method; what goes through it is written down, image by image and step by step."""

    def watch(self, rounds: list[dict]) -> dict[str, Tensor]:
        """Run the rounds, and return the recorded arrays."""
        self.seen: dict[str, Tensor] = {}
        for index, described in enumerate(rounds):
            self.round, self.orders, self.optimizer_steps = index, described["orders"], itertools.count()
            shape = (len(self.orders), len(described["rewards"]), self.num_train_timesteps)
            self.note("losses", torch.full(shape, torch.nan))
            self.note("ratios", torch.full(shape, torch.nan))
            with patch.object(torch, "randperm", self.given_order()):
                self.step(index, 0)
        return self.seen

    def note(self, name: str, value: Tensor) -> None:
        self.seen[f"round{self.round}/{name}"] = value.detach().float().contiguous().clone()

    def given_order(self) -> Any:
        """Replace `randperm` for one step: images in the given order, steps shuffled as in TRL."""
        calls, num_images, orders = itertools.count(), len(self.orders[0]), iter(self.orders)
        present = list(range(num_images))  # TRL shuffles what the last inner epoch had shuffled

        def given(count: int, **keys: Any) -> Tensor:
            if next(calls) % (1 + num_images):
                return randperm(count, **keys)
            wanted = next(orders)
            places = [present.index(image) for image in wanted]
            present[:] = wanted
            return torch.tensor(places)

        return given

    def _generate_samples(self, iterations: int, batch_size: int) -> Any:
        samples, scored = super()._generate_samples(iterations, batch_size)
        paths = [torch.cat([batch["latents"], batch["next_latents"][:, -1:]], dim=1) for batch in samples]
        self.note("latents", torch.cat(paths))
        self.note("log_probs", torch.cat([batch["log_probs"] for batch in samples]))
        self.note("images", torch.cat([images for images, _, _ in scored]))
        return samples, scored

    def _train_batched_samples(self, inner_epoch: int, epoch: int, global_step: int, batched_samples: list) -> int:
        advantages = torch.cat([batch["advantages"] for batch in batched_samples])
        self.note("advantages", advantages[torch.tensor(self.orders[inner_epoch]).argsort()])
        batches = torch.tensor(self.orders[inner_epoch]).split(self.config.train_batch_size)
        self.images = iter([images for images in batches for _ in range(self.num_train_timesteps)])
        self.inner_epoch = inner_epoch
        return super()._train_batched_samples(inner_epoch, epoch, global_step, batched_samples)

    def calculate_loss(self, latents: Tensor, timesteps: Tensor, *rest: Tensor) -> Any:
        path = self.sd_pipeline.scheduler.timesteps.tolist()
        steps = torch.tensor([path.index(timestep) for timestep in timesteps.tolist()])
        self.pairs = (self.inner_epoch, next(self.images), steps)
        return super().calculate_loss(latents, timesteps, *rest)

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        own = super().loss  # its mean over one pair is the pair's loss
        each = [own(advantages[row : row + 1], clip_range, ratio[row : row + 1]) for row in range(len(ratio))]
        self.seen[f"round{self.round}/losses"][self.pairs] = torch.stack(each).detach().float()
        self.seen[f"round{self.round}/ratios"][self.pairs] = ratio.detach()
        return own(advantages, clip_range, ratio)


def note_optimizer_steps(trainer: WatchedTrainer) -> None:
    """Record each optimizer step's gradient after clipping, and the adapters after the step."""
    adapters = {name: value for name, value in trainer.sd_pipeline.unet.named_parameters() if value.requires_grad}

    def before(*_: Any) -> None:
        trainer.place = f"step{next(trainer.optimizer_steps)}"
        for name, value in adapters.items():
            trainer.note(f"{trainer.place}/gradient/{name}", value.grad)

    def after(*_: Any) -> None:
        for name, value in adapters.items():
            trainer.note(f"{trainer.place}/weights/{name}", value)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


@torch.no_grad()
def load_weights(network: torch.nn.Module, adapters: dict[str, Tensor]) -> None:
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert parameters.keys() == adapters.keys(), "TRL attaches the same adapters, under the same names"
    for name, value in parameters.items():
        value.copy_(adapters[name])


def trainer_of(job: dict) -> WatchedTrainer:
    PartialState()  # without it TRL's pipeline dies of its own warning that the model has no LoRA yet
    rounds, size = job["rounds"], job["config"]["sample_batch_size"]
    tasks = [(one, first) for one in rounds for first in range(0, len(one["rewards"]), size)]
    rewards = iter([one["rewards"][first : first + size] for one, first in tasks])
    prompts = iter([(prompt, {}) for one in rounds for prompt in one["prompts"]])
    pipeline = SeededPipeline(job["model"])
    pipeline.seeds = iter([one["seeds"][first : first + size] for one, first in tasks])
    return WatchedTrainer(
        DDPOConfig(save_freq=1000, **job["config"]),
        lambda images, prompts, metadata: (torch.tensor(next(rewards)), {}),
        lambda: next(prompts),
        pipeline,
    )


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    trainer = trainer_of(job)
    load_weights(trainer.sd_pipeline.unet, load_file(folder / "adapters.safetensors"))
    note_optimizer_steps(trainer)
    save_file(trainer.watch(job["rounds"]), folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
