"""Compile the learner's network before the first round, by the passes of a micro-batch of zeros."""

import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.compile_turns import compile_in_turn
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.common.user_code.blame import is_users_own
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.optimization.micro_batch import made_up_batch


def compile_learning(config: PolicyConfig, policy: Policy, algorithm: Algorithm, recipe: Recipe, size: int) -> None:
    """Compile the network for micro-batches of this size, with and without gradients. It changes nothing.

    A user's own family is compiled in the first round, because zeros may not be valid conditioning for it.
    """
    if not config.is_compiled("learner") or is_users_own(config, POLICIES):
        return
    sizes = config.sizes(recipe.sampling, "cuda" if policy.device.startswith("cuda") else "cpu")

    def passes() -> None:
        batch = made_up_batch(policy, algorithm, sizes, size)
        if isinstance(batch, TransitionBatch):
            with torch.no_grad():  # as the check of the samplers' log-probs
                policy.transition(batch.latents, batch.steps, batch.conditioning)
        algorithm.compute_loss(policy, batch).loss.sum().backward()
        policy.network.zero_grad(set_to_none=True)

    keys = [type(config).__qualname__, config.model_dump_json(), recipe.sampling.model_dump_json(), recipe.algorithm]
    compile_in_turn("learner", "\n".join(map(str, [*keys, size])), passes)
