"""A round's (image, noising) pairs: its finished images noised again, each time to a timestep of its own."""

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

_NOISING = 7  # what an image's seed is hashed with for them


@dataclass(frozen=True)
class NoisedSamples(TrainingItems):
    """Timestep and noise come from the image's own seed and the place, on the CPU: nothing else decides them."""

    transitions: RoundTransitions  # whose finished images these are
    seeds: tuple[int, ...]  # of the images
    per_image: int  # in an inner epoch
    num_train_timesteps: int

    @property
    def num_images(self) -> int:
        return self.transitions.num_images

    def places(self, inner_epoch: int) -> range:
        return range(inner_epoch * self.per_image, (inner_epoch + 1) * self.per_image)

    def batch(self, pairs: list[TransitionIndex]) -> NoisedBatch:
        of, device = self.transitions, self.transitions.device
        index = to_device(torch.tensor([image for image, _ in pairs]), device)
        rows = [of.images[image] for image, _ in pairs]
        clean = torch.stack([of.trajectories[trajectory].final_latents[row] for trajectory, row in rows])
        sampled = [self._drawn(image, place, clean.shape[1:]) for image, place in pairs]
        return NoisedBatch(
            select_rows(of.conditioning, of.prompt_rows[index]),
            to_device(torch.tensor([timestep for timestep, _ in sampled]), device),
            to_device(clean, device),
            to_device(torch.stack([noise for _, noise in sampled]), device),
            of.advantages[index],
        )

    def _drawn(self, image: int, place: int, shape: torch.Size) -> tuple[int, Float[Tensor, "C H W"]]:
        word = np.random.SeedSequence([self.seeds[image], _NOISING, place]).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(word) >> 1)
        timestep = int(torch.randint(self.num_train_timesteps, (1,), generator=generator))
        return timestep, torch.randn(shape, generator=generator)
