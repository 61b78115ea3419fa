"""The noised samples of a round: its finished images with noise added again, each sample at its own timestep."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import NoisedBatch, TrainBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.round_data.transitions import RoundTransitions

_NOISING = 7  # hashed with an image's seed, so that this noise differs from every other stream


@dataclass(frozen=True)
class NoisedSamples:
    """The noised samples of a round.

    Timestep and noise are a function of the image's seed and the sample's position, computed on the CPU. If groups share
    them, all images of a group have those of its first image. The samples of an image divide the model's timesteps into
    equal parts and have one each.
    """

    transitions: RoundTransitions  # of the finished images
    seeds: tuple[int, ...]  # of the images
    per_image: int  # samples in an inner epoch
    num_train_timesteps: int
    sharing_images: int = 1  # of a group, which share noise and timestep; 1: each image has its own

    @property
    def num_images(self) -> int:
        """The number of images of the round, or of its part."""
        return len(self.seeds)

    def positions(self, inner_epoch: int) -> range:
        """Return the numbers of an image's samples in an inner epoch. No two inner epochs have the same ones."""
        return range(inner_epoch * self.per_image, (inner_epoch + 1) * self.per_image)

    def batch(self, indices: Int[Tensor, "B 2"]) -> NoisedBatch:
        """Return the noised samples at these indices on the device, one row each."""
        of = self.transitions
        images = to_device(indices[:, 0], of.device)
        clean = of.gather("final_latents", indices[:, 0])
        sampled = [self._timestep_and_noise(image, position, clean.shape[1:]) for image, position in indices.tolist()]
        return NoisedBatch(
            select_rows(of.conditioning, of.prompt_rows[images]),
            to_device(torch.tensor([timestep for timestep, _ in sampled]), of.device),
            clean,
            to_device(torch.stack([noise for _, noise in sampled]), of.device),
            of.advantages[images],
            groups=to_device(self.groups(indices), of.device) if self.sharing_images > 1 else None,
        )

    def groups(self, indices: Int[Tensor, "B 2"]) -> Int[Tensor, "B"]:
        """Return a number for each row that rows of one group and one position share."""
        group, position = indices[:, 0] // self.sharing_images, indices[:, 1]
        return group + position * self.num_images

    def _timestep_and_noise(self, image: int, position: int, shape: torch.Size) -> tuple[int, Float[Tensor, "C *S"]]:
        seed = self.seeds[image // self.sharing_images * self.sharing_images]
        word = np.random.SeedSequence([seed, _NOISING, position]).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(word) >> 1)
        place = int(torch.randint(self.num_train_timesteps, (1,), generator=generator))
        timestep = (position % self.per_image * self.num_train_timesteps + place) // self.per_image
        return timestep, torch.randn(shape, generator=generator)


def training_items(
    algorithm: Algorithm,
    batch: TrainBatch,
    transitions: RoundTransitions,
    num_train_timesteps: int,
    images_per_prompt: int = 1,
) -> RoundTransitions | NoisedSamples:
    """Return the algorithm's training items: the sampled transitions, or the finished images with noise added."""
    per_image = algorithm.noised_samples_per_image
    if per_image is None:
        return transitions
    seeds = tuple(seed for report in batch.reports for seed in report.task.seeds)
    sharing = images_per_prompt if algorithm.shares_noise else 1
    return NoisedSamples(transitions, seeds, per_image, num_train_timesteps, sharing)
