"""The noised samples of a round: its finished images with noise added again, each sample at its own timestep."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.round_data.transitions import RoundTransitions
from ray_ddpo.learner.round_data.transitions_index import TrainingItems, TransitionIndex

_NOISING = 7  # hashed with an image's seed, so that this noise differs from every other stream


@dataclass(frozen=True)
class NoisedSamples(TrainingItems):
    """The noised samples of a round.

    Timestep and noise are a function of the image's seed and the sample's position, computed on the CPU.
    """

    transitions: RoundTransitions  # of the finished images
    seeds: tuple[int, ...]  # of the images
    per_image: int  # samples in an inner epoch
    num_train_timesteps: int

    @property
    def num_images(self) -> int:
        return self.transitions.num_images

    def positions(self, inner_epoch: int) -> range:
        return range(inner_epoch * self.per_image, (inner_epoch + 1) * self.per_image)

    def batch(self, indices: list[TransitionIndex]) -> NoisedBatch:
        of, device = self.transitions, self.transitions.device
        index = to_device(torch.tensor([image for image, _ in indices]), device)
        rows = [of.images[image] for image, _ in indices]
        clean = torch.stack([of.trajectories[trajectory].final_latents[row] for trajectory, row in rows])
        sampled = [self._timestep_and_noise(image, position, clean.shape[1:]) for image, position in indices]
        return NoisedBatch(
            select_rows(of.conditioning, of.prompt_rows[index]),
            to_device(torch.tensor([timestep for timestep, _ in sampled]), device),
            to_device(clean, device),
            to_device(torch.stack([noise for _, noise in sampled]), device),
            of.advantages[index],
        )

    def _timestep_and_noise(self, image: int, position: int, shape: torch.Size) -> tuple[int, Float[Tensor, "C H W"]]:
        word = np.random.SeedSequence([self.seeds[image], _NOISING, position]).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(word) >> 1)
        timestep = int(torch.randint(self.num_train_timesteps, (1,), generator=generator))
        return timestep, torch.randn(shape, generator=generator)
