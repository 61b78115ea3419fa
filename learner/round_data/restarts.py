"""The restarts of a round: where each image's trajectory is taken again, with the sampler's noise."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, select_rows
from ray_ddpo.common.diffusion.rollout import image_noise
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import RestartBatch, TrainBatch
from ray_ddpo.learner.algorithms.denoising_gradient import steps_of
from ray_ddpo.learner.round_data.transitions import RoundTransitions

_NOISED_AGAIN = 9  # hashed with an image's seed: the noise of restarts from noised final latents


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """The restarts of a round.

    An image's first restart begins at its stored latents. Further ones (DRaFT-LV) begin at the last step, from its final
    latents with other noise, which is a function of the image's seed and the restart's position.
    """

    transitions: RoundTransitions  # of the finished images
    seeds: tuple[int, ...]  # of the images
    starts: tuple[int, ...]  # the step of each image where its stored latents are
    prompts: tuple[Prompt, ...]
    per_image: int  # restarts in an inner epoch
    num_steps: int
    stochastic: frozenset[int]  # the steps that have noise
    sampling: SamplingTable
    noised: Callable[[Tensor, Tensor, int], Tensor]  # (clean latents, noise, step) → latents before that step

    @property
    def num_images(self) -> int:
        """The number of images of the round, or of its part."""
        return len(self.seeds)

    def positions(self, inner_epoch: int) -> range:
        """Return the numbers of an image's restarts in an inner epoch."""
        return range(inner_epoch * self.per_image, (inner_epoch + 1) * self.per_image)

    def batch(self, indices: Int[Tensor, "B 2"]) -> RestartBatch:
        """Return the restarts at these indices on the device, one row each."""
        of, images = self.transitions, indices[:, 0]
        again = [position % self.per_image > 0 for position in indices[:, 1].tolist()]
        starts = tuple(
            self.num_steps - 1 if each else self.starts[image]
            for each, image in zip(again, images.tolist(), strict=True)
        )
        latents = of.gather("start_latents", images)
        if any(again):
            rows = torch.tensor(again).nonzero().flatten()
            fresh = torch.stack([self._generated(*indices[row].tolist())[0] for row in rows.tolist()])
            clean = of.gather("final_latents", images[rows])
            noised = self.noised(clean.float(), to_device(fresh, of.device), self.num_steps - 1).to(latents.dtype)
            latents = latents.index_copy(0, to_device(rows, of.device), noised)
        prompts = [self.prompts[image] for image in images.tolist()]
        return RestartBatch(
            select_rows(of.conditioning, of.prompt_rows[to_device(images, of.device)]),
            starts,
            latents,
            self._noise(indices, starts, again),
            tuple(prompt.text for prompt in prompts),
            tuple(dict(prompt.metadata) for prompt in prompts),
            self.sampling.latents_dtype,
        )

    def _noise(
        self, indices: Int[Tensor, "B 2"], starts: tuple[int, ...], again: list[bool]
    ) -> dict[int, Float[Tensor, "B C *S"]]:
        """Return the noise of each stochastic step: the sampler's, or new noise of a restart from noised latents."""
        device, first = self.transitions.device, min(starts)
        steps = [step for step in range(first, self.num_steps) if step in self.stochastic]
        if not steps:
            return {}
        rows = []
        for (image, position), is_again in zip(indices.tolist(), again, strict=True):
            own = self._sampled(image, steps)
            if is_again:  # only its last step is taken
                own[-1] = self._generated(image, position)[1]
            rows.append(torch.stack(own))
        return {step: to_device(noise, device) for step, noise in zip(steps, torch.stack(rows, 1), strict=True)}

    def _sampled(self, image: int, steps: list[int]) -> list[Float[Tensor, "C *S"]]:
        """Return the noise that the sampler used in these steps. The image's first noise is its initial latents."""
        drawn = list(islice(image_noise([self.seeds[image]], self._shape), steps[-1] + 2))
        return [drawn[step + 1][0] for step in steps]

    def _generated(self, image: int, position: int) -> Float[Tensor, "2 C *S"]:
        """Return the noise that is added to final latents, and that of the last step."""
        word = np.random.SeedSequence([self.seeds[image], _NOISED_AGAIN, position]).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(word) >> 1)
        return torch.stack([torch.randn(self._shape, generator=generator) for _ in range(2)])

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.transitions.trajectories[0].final_latents.shape[1:])


def restarts_of(
    per_image: int, batch: TrainBatch, transitions: RoundTransitions, policy: Policy, sampling: SamplingTable
) -> Restarts:
    """Return the restarts of a round, whose tasks share one window of stochastic steps."""
    window = batch.reports[0].task.window
    stochastic = range(0) if sampling.deterministic else policy.stochastic_steps if window is None else window

    def noised(clean: Tensor, noise: Tensor, step: int) -> Tensor:
        return steps_of(policy, "algorithm.name is 'draft_lv'").noised(clean, noise, step)

    columns = [trajectory.start_steps for trajectory in transitions.trajectories]
    return Restarts(
        transitions=transitions,
        starts=tuple(step for column in columns if column is not None for step in column.tolist()),
        seeds=tuple(seed for report in batch.reports for seed in report.task.seeds),
        prompts=tuple(prompt for report in batch.reports for prompt in report.task.prompts),
        per_image=per_image,
        num_steps=policy.num_steps,
        stochastic=frozenset(stochastic) & frozenset(policy.stochastic_steps),
        sampling=sampling,
        noised=noised,
    )
