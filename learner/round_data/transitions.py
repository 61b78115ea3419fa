"""A round's (image, step) pairs: the steps that its images took, as tensors on the device."""

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
    """Reads pairs straight out of the trajectories' own memory; only what a micro-batch needs is copied to the device."""

    trajectories: tuple[Trajectory, ...]
    images: tuple[tuple[int, int], ...]  # of each image: its trajectory, its row there
    conditioning: Conditioning  # of all trajectories' prompts, on the device
    prompt_rows: Int[Tensor, "N"]
    advantages: Float[Tensor, "N"]
    device: str

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_places(self) -> int:
        """Steps that each image is learned from."""
        return self.trajectories[0].steps.shape[1]

    def places(self, inner_epoch: int) -> range:
        return range(self.num_places)

    def batch(self, pairs: list[TransitionIndex]) -> TransitionBatch:
        rows = [(self.trajectories[self.images[image][0]], self.images[image][1], place) for image, place in pairs]
        index = to_device(torch.tensor([image for image, _ in pairs]), self.device)

        def stacked(tensors: list[Tensor]) -> Tensor:
            return to_device(torch.stack(tensors), self.device)

        return TransitionBatch(
            select_rows(self.conditioning, self.prompt_rows[index]),
            stacked([trajectory.steps[row, place] for trajectory, row, place in rows]),
            stacked([trajectory.latents[row, place] for trajectory, row, place in rows]),
            stacked([trajectory.next_latents[row, place] for trajectory, row, place in rows]),
            stacked([trajectory.log_probs[row, place] for trajectory, row, place in rows]),
            self.advantages[index],
        )


def round_transitions(
    trajectories: tuple[Trajectory, ...], advantages: Float[np.ndarray, "N"], device: str
) -> RoundTransitions:
    """Number the images of all trajectories in task order and bring their conditioning to the device."""
    images = tuple(
        (index, row) for index, trajectory in enumerate(trajectories) for row in range(len(trajectory.steps))
    )
    offsets = np.cumsum([0, *(_num_prompts(trajectory) for trajectory in trajectories)])
    prompt_rows = torch.cat(
        [trajectory.prompt_index + int(offset) for trajectory, offset in zip(trajectories, offsets[:-1], strict=True)]
    )
    return RoundTransitions(
        trajectories,
        images,
        {name: _joined(trajectories, name).to(device) for name in trajectories[0].conditioning},
        prompt_rows.to(device),
        torch.from_numpy(advantages.astype(np.float32)).to(device),
        device,
    )


def _num_prompts(trajectory: Trajectory) -> int:
    return int(trajectory.prompt_index.max()) + 1


def _joined(trajectories: tuple[Trajectory, ...], name: str) -> Tensor:
    if name.startswith("negative_"):  # the same for all prompts
        return trajectories[0].conditioning[name]
    return torch.cat([trajectory.conditioning[name] for trajectory in trajectories])
