"""Check that the learner's last steps make the sampler's images, before it takes a reward's gradient through them."""

from dataclasses import dataclass

import torch

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.algorithms.denoising_gradient import denoised_to_the_end
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.round_data.restarts import Restarts

MOST_IMAGES = 2  # of a round that are checked, one by one, so that the check needs little memory


class RestartDiffers(RuntimeError):
    """The learner's last steps make other images than the sampler's."""


@dataclass(frozen=True)
class RestartError:
    """The largest differences between sampler and learner over the checked images."""

    grey_levels: float  # mean over an image's pixels, of 0 … 255
    reward: float  # the reward workers' scores and the learner's


@torch.no_grad()
def restart_error(
    policy: Policy, algorithm: RewardGradient, restarts: Restarts, batch: TrainBatch
) -> RestartError | None:
    """Compare images and rewards. The policy has the weights that the round was sampled with.

    Returns:
        The differences, or None if every image of the round is dropped.
    """
    images = [image for image in range(restarts.num_images) if image not in batch.dropped][:MOST_IMAGES]
    levels, scores = [], []
    for image in images:
        rows = restarts.batch(torch.tensor([[image, 0]]))
        final = restarts.transitions.gather("final_latents", torch.tensor([image])).float()
        ours, theirs = (
            (255 * policy.decode_pixels(each)).round() for each in (denoised_to_the_end(policy, rows), final)
        )
        levels.append(float((ours - theirs).abs().mean()))
        scores.append(abs(float(algorithm.rewards_of(policy, final, rows)) - float(batch.advantages[image])))
    return RestartError(max(levels), max(scores)) if images else None


def tolerance_of(algorithm: RewardGradient, config: PolicyConfig) -> float:
    """Return the largest accepted mean difference of an image, in grey levels of 255."""
    exact = {config.dtype_of("sampler"), config.dtype_of("learner")} == {torch.float32}
    return algorithm.restart_tolerance or (1.0 if exact else 8.0)


def refuse_difference(found: RestartError, algorithm: RewardGradient, config: PolicyConfig, batch: TrainBatch) -> None:
    """Raise RestartDiffers if an image differs by more than the tolerance."""
    tolerance = tolerance_of(algorithm, config)
    if found.grey_levels <= tolerance:
        return
    raise RestartDiffers(
        f"round {batch.round}: with the sampler's weights and noise, the learner's last steps make images that differ by "
        f"{found.grey_levels:.2g} grey levels on average, over algorithm.restart_tolerance = {tolerance:g}: the "
        "gradient would be of other images; give sampler and learner the same dtype, or a larger tolerance"
    )
