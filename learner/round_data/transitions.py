"""The transitions of a round: the denoising steps of its images, as tensors on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Conditioning, select_rows
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import Trajectory, TransitionBatch
from ray_ddpo.learner.round_data.transitions_index import TrainingItems, TransitionIndex


@dataclass(frozen=True)
class RoundTransitions(TrainingItems):
    """The transitions of a round, read in the trajectories' own memory.

    Only a micro-batch's transitions are copied to the device.
    """

    trajectories: tuple[Trajectory, ...]
    images: tuple[tuple[int, int], ...]  # each image's trajectory, and its row there
    conditioning: Conditioning  # of all trajectories' prompts, on the device
    prompt_rows: Int[Tensor, "N"]
    advantages: Float[Tensor, "N"]
    device: str

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_trained_steps(self) -> int:
        """The number of steps of an image that are trained on."""
        return self.trajectories[0].steps.shape[1]

    def positions(self, inner_epoch: int) -> range:
        return range(self.num_trained_steps)

    def batch(self, indices: list[TransitionIndex]) -> TransitionBatch:
        rows = [(self.trajectories[self.images[image][0]], self.images[image][1], step) for image, step in indices]
        index = to_device(torch.tensor([image for image, _ in indices]), self.device)

        def stacked(tensors: list[Tensor]) -> Tensor:
            return to_device(torch.stack(tensors), self.device)

        return TransitionBatch(
            select_rows(self.conditioning, self.prompt_rows[index]),
            stacked([trajectory.steps[row, step] for trajectory, row, step in rows]),
            stacked([trajectory.latents[row, step] for trajectory, row, step in rows]),
            stacked([trajectory.next_latents[row, step] for trajectory, row, step in rows]),
            stacked([trajectory.log_probs[row, step] for trajectory, row, step in rows]),
            self.advantages[index],
        )


def round_transitions(
    trajectories: tuple[Trajectory, ...], advantages: Float[np.ndarray, "N"], device: str
) -> RoundTransitions:
    """Number the images of all trajectories in task order, and copy their conditioning to the device."""
    images = tuple(
        (index, row) for index, trajectory in enumerate(trajectories) for row in range(len(trajectory.steps))
    )
    num_prompts = (int(trajectory.prompt_index.max()) + 1 for trajectory in trajectories)
    offsets = np.cumsum([0, *num_prompts])
    prompt_rows = torch.cat(
        [trajectory.prompt_index + int(offset) for trajectory, offset in zip(trajectories, offsets[:-1], strict=True)]
    )
    return RoundTransitions(
        trajectories,
        images,
        {name: _concatenated(trajectories, name).to(device) for name in trajectories[0].conditioning},
        prompt_rows.to(device),
        torch.from_numpy(advantages.astype(np.float32)).to(device),
        device,
    )


def _concatenated(trajectories: tuple[Trajectory, ...], name: str) -> Tensor:
    if name.startswith("negative_"):  # the same for all prompts
        return trajectories[0].conditioning[name]
    return torch.cat([trajectory.conditioning[name] for trajectory in trajectories])
