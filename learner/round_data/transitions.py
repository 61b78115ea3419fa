"""The transitions of a round: the denoising steps of its images as columns, and the order to train on them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.guidance import is_shared
from ray_ddpo.common.diffusion.policy import Conditioning, select_rows
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import Trajectory, TransitionBatch

# The (image, step) indices of training items. The axis is anonymous, because lists hold indices of different lengths.
Indices = Int[Tensor, "_ 2"]


def indices_of(images: Int[Tensor, "N"], positions: range) -> Indices:
    """Return the (image, step) indices of these images, position by position.

    Args:
        images: numbers of images in the round, or in its part.
        positions: numbers of each image's trained steps, or of its noised samples.
    """
    return torch.cartesian_prod(torch.tensor(positions), images).flip(1)


def optimizer_steps(
    order: Int[np.ndarray, "N"], size: int, dropped: tuple[int, ...], positions: range
) -> list[Indices]:
    """Return the indices of each optimizer step: of `size` images in `order`, without dropped images.

    A dropped image does not move another one to a different step. A remainder of fewer than `size` images joins the
    last full step: a few images alone would otherwise make a full step.
    """
    cut = np.split(order, range(size, len(order) - size + 1, size)) if len(order) else []
    return [indices_of(torch.from_numpy(images[~np.isin(images, dropped)]), positions) for images in cut]


def micro_batches(indices: Indices, size: int) -> tuple[Indices, ...]:
    """Cut `indices` into micro-batches of `size`; the last is smaller only if images of the step are dropped."""
    return indices.split(size) if len(indices) else ()


@dataclass(frozen=True, kw_only=True)
class RoundTransitions:
    """The transitions of a round of N images with W trained steps each.

    Small columns are on the device. Latents stay in the trajectories' own memory, which may be Ray's object store: one
    column [N, W, …] would be a second copy of a round. Only a micro-batch's latents are copied.
    """

    trajectories: tuple[Trajectory, ...]
    task: Int[Tensor, "N"]  # each image's trajectory
    row: Int[Tensor, "N"]  # its row there
    conditioning: Conditioning  # of all trajectories' prompts
    prompt_rows: Int[Tensor, "N"]
    steps: Int[Tensor, "N W"]
    log_probs: Float[Tensor, "N W"]
    advantages: Float[Tensor, "N"]
    device: str
    kl_weights: Float[Tensor, "N"] | None = None
    baselines: Float[Tensor, "N W"] | None = None  # values, which are subtracted from advantages

    @property
    def num_images(self) -> int:
        """The number of images of the round, or of its part."""
        return len(self.task)

    def positions(self, inner_epoch: int) -> range:
        """Return the numbers of an image's trained steps, which every inner epoch trains on again."""
        return range(self.steps.shape[1])

    def batch(self, indices: Int[Tensor, "B 2"]) -> TransitionBatch:
        """Return the transitions at these indices on the device, one row each."""
        images, positions = to_device(indices, self.device).unbind(1)
        advantages = self.advantages[images]
        return TransitionBatch(
            select_rows(self.conditioning, self.prompt_rows[images]),
            self.steps[images, positions],
            self.gather("latents", *indices.unbind(1)),
            self.gather("next_latents", *indices.unbind(1)),
            self.log_probs[images, positions],
            advantages if self.baselines is None else advantages - self.baselines[images, positions],
            kl_weights=None if self.kl_weights is None else self.kl_weights[images],
        )

    def gather(
        self, name: str, images: Int[Tensor, "B"], positions: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B C *S"]:
        """Copy latents of the trajectories to the device.

        Args:
            name: the trajectories' field.
            positions: the second axis of that field, if it has one.
        """
        axes = [self.task[images], self.row[images], *([] if positions is None else [positions])]
        columns = [getattr(trajectory, name) for trajectory in self.trajectories]
        # Copies each latent once. Advanced indexing trajectory by trajectory would copy twice, to restore the order.
        latents = [columns[task][tuple(index)] for task, *index in torch.stack(axes, 1).tolist()]
        return to_device(torch.stack(latents), self.device)


def round_transitions(
    trajectories: tuple[Trajectory, ...],
    advantages: Float[np.ndarray, "N"],
    device: str,
    kl_weights: Float[np.ndarray, "N"] | None = None,
) -> RoundTransitions:
    """Number the images of all trajectories in task order, and copy their small columns to the device."""
    sizes = torch.tensor([len(trajectory.steps) for trajectory in trajectories])
    num_prompts = torch.tensor([int(trajectory.prompt_index.max()) + 1 for trajectory in trajectories])
    task = torch.arange(len(sizes)).repeat_interleave(sizes)

    def column(name: str) -> Tensor:
        return torch.cat([getattr(trajectory, name) for trajectory in trajectories])

    return RoundTransitions(
        trajectories=trajectories,
        task=task,
        row=torch.arange(len(task)) - (sizes.cumsum(0) - sizes)[task],
        conditioning={name: _conditioning(trajectories, name).to(device) for name in trajectories[0].conditioning},
        prompt_rows=(column("prompt_index") + (num_prompts.cumsum(0) - num_prompts)[task]).to(device),
        steps=column("steps").to(device),
        log_probs=column("log_probs").to(device),
        advantages=torch.from_numpy(advantages.astype(np.float32)).to(device),
        device=device,
        kl_weights=None if kl_weights is None else torch.from_numpy(kl_weights.astype(np.float32)).to(device),
    )


def _conditioning(trajectories: tuple[Trajectory, ...], name: str) -> Tensor:
    if is_shared(name):
        return trajectories[0].conditioning[name]
    return torch.cat([trajectory.conditioning[name] for trajectory in trajectories])
