"""Try a user's differentiable rewards on noise before the first round: their scores, and the gradients of these."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.differentiable_reward import NO_DETACH, DifferentiableReward, check_scores, expected_scores
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.runtime import torch_settings_kept, undisturbed
from ray_ddpo.common.user_code.blame import blamed
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient

# The lowest and the highest pixel of each image. A reward may be flat for dark, bright or grey images, but not for all.
RANGES = ((0.0, 1.0), (0.0, 0.3), (0.7, 1.0), (0.4, 0.6))


def try_reward_gradients(policy: Policy, algorithm: RewardGradient) -> None:
    """Score images of noise with the user's rewards, and take the gradient with respect to the pixels.

    Raises:
        ValueError: a reward raises, returns no finite number for each image, or has no gradient or one that is 0 or not
            finite.
    """
    rewards = algorithm.users_rewards
    if not rewards:
        return
    with undisturbed(), torch.no_grad():
        blank = policy.decode_pixels(torch.zeros(1, *policy.latent_shape, device=policy.device))
        pixels = _noise(blank[0])
    prompts = [algorithm.trial_prompts[row % len(algorithm.trial_prompts)] for row in range(len(pixels))]
    for who, reward in rewards:
        with undisturbed(), torch_settings_kept():
            _try(who, reward, pixels.clone(), prompts)


def _noise(like: Float[Tensor, "3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Return noise in each of the ranges, as large as this image."""
    noise = torch.rand(len(RANGES), *like.shape, generator=torch.Generator().manual_seed(0))
    low, high = (torch.tensor(ends).view(-1, 1, 1, 1) for ends in zip(*RANGES, strict=True))
    return (low + (high - low) * noise).to(like.device)


def _try(who: str, reward: DifferentiableReward, pixels: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if the scores of noise cannot be learned from."""
    pixels.requires_grad_()
    texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
    expected, noise = expected_scores(len(pixels)), f"for {len(pixels)} images of noise"
    with torch.enable_grad():
        try:
            with blamed(f"{who}, called with images that have gradients,"):
                values = reward(pixels, texts, metadata)
        except ValueError as error:
            raise ValueError(f"{error}: expected {expected}") from error
        check_scores(who, values, len(pixels), wants_gradient=True)
        if not values.isfinite().all():
            raise ValueError(f"{who} returned {values.tolist()} {noise}: expected {expected}")
        with blamed(f"the gradient of {who}"):
            (gradient,) = torch.autograd.grad(values.sum(), pixels, allow_unused=True)
    if gradient is None or not gradient.any():
        lack = "no gradient" if gradient is None else "a gradient of 0"
        raise ValueError(f"{who} has {lack} with respect to the images {noise}: expected {expected}; {NO_DETACH}")
    if not gradient.isfinite().all():
        raise ValueError(
            f"{who} has a gradient with respect to the images that is NaN or infinite {noise}: expected finite numbers; "
            "look for a root, a logarithm or a quotient at 0"
        )
