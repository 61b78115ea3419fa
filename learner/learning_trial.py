"""Try a user's model family, algorithm or differentiable reward on the learner before the first round."""

import numpy as np
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.memory.meta_device import IntegerIndices
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.diffusion.policy_trial import try_files
from ray_ddpo.common.diffusion.tensor_checks import check_tensor, described, refuse_unless
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.common.user_code.blame import blamed, call, call_if_own, is_users_own
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.optimization.micro_batch import made_up_batch
from ray_ddpo.learner.reward_gradient_trial import try_reward_gradients


def try_learning(policy: Policy, config: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> None:
    """Compute a loss and gradients on two synthetic transitions, and discard the gradients.

    Only a user's model family, algorithm or differentiable reward is tried, not those of this package.

    Raises:
        ValueError: a method of the user's raises, or returns a wrong type, shape or dtype.
    """
    if isinstance(algorithm, RewardGradient):
        try_reward_gradients(policy, algorithm)
    own_family, own_algorithm = is_users_own(config, POLICIES), is_users_own(algorithm, ALGORITHMS)
    if not own_family and not own_algorithm:
        return
    with undisturbed():
        if own_algorithm:
            _try_advantages(algorithm, recipe.prompts.images_per_prompt)
        kind = "cuda" if policy.device.startswith("cuda") else "cpu"
        sizes, name = call_if_own(config, POLICIES, "sizes", recipe.sampling, kind), f"{type(config).__name__}.sizes"
        refuse_unless(isinstance(sizes, PolicySizes), f"{name} returned {described(sizes)}", "PolicySizes")
        with IntegerIndices():
            _try_loss(policy, algorithm, sizes)
        policy.network.zero_grad(set_to_none=True)
        try_files(config, policy)


def _try_advantages(algorithm: Algorithm, images_per_prompt: int) -> None:
    """Compute advantages of the images of two prompts, and check their shape and dtype."""
    count = 2 * images_per_prompt
    prompts = ["one"] * images_per_prompt + ["two"] * images_per_prompt
    rewards = np.linspace(0, 1, count)
    name = f"{type(algorithm).__name__}.compute_advantages"
    result = call(algorithm, "compute_advantages", {}, prompts, rewards, images_per_prompt)
    pair = isinstance(result, tuple) and len(result) == 2
    refuse_unless(pair, f"{name} returned {described(result)}", "the statistics, and one number for each image")
    found = result[1]
    fits = (
        isinstance(found, np.ndarray)
        and found.shape == (count,)
        and found.dtype.kind == "f"
        and np.isfinite(found).all()
    )
    came = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else described(found)
    refuse_unless(fits, f"{name} returned {came}", f"finite floats of shape ({count},), one for each image")


def _try_loss(policy: Policy, algorithm: Algorithm, sizes: PolicySizes) -> None:
    """Compute a loss on a synthetic batch, and check that gradients reach the trained parameters."""
    batch = made_up_batch(policy, algorithm, sizes, 2)
    moved = f"{type(policy).__name__}.denoise"
    if isinstance(batch, TransitionBatch):
        moved = f"{type(policy).__name__}.transition"
        transition = call(policy, "transition", batch.latents, batch.steps, batch.conditioning)
        refuse_unless(transition.mean.requires_grad, f"{moved} gave a mean without gradients", _GRADIENTS)
    name, result = f"{type(algorithm).__name__}.compute_loss", call(algorithm, "compute_loss", policy, batch)
    refuse_unless(isinstance(result, TransitionLoss), f"{name} returned {described(result)}", "a TransitionLoss")
    loss: Tensor = check_tensor(f"{name} returned a loss of", result.loss, (2,), None)
    refuse_unless(loss.requires_grad, f"{name} returned a loss without gradients", _GRADIENTS)
    with blamed(f"the gradients of {name}"):
        torch.autograd.backward(loss.sum())
    reached = [parameter for parameter in trained_parameters(policy.network).values() if parameter.grad is not None]
    refuse_unless(bool(reached), f"gradients of {moved} reach none of the trained parameters", _GRADIENTS)


_GRADIENTS = "gradients of what is trained: no torch.no_grad() or detach() there"
