"""Decide whether the learner re-computes activations: with "auto", only if its micro-batches do not fit otherwise."""

from typing import Any

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.optimization.micro_batch import MicroBatchSearch, micro_batch_size

# Re-computing costs another forward pass. Micro-batches that are smaller than this leave so much of a GPU idle that the
# larger ones which re-computing makes possible are worth it.
LEAST = 4


def loadable(config: PolicyConfig) -> PolicyConfig:
    """Return the policy to load: "auto" begins without gradient checkpointing."""
    return config.with_checkpointing(False) if config.gradient_checkpointing == "auto" else config


def fit_micro_batches(policy: Policy, config: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> tuple[int, bool]:
    """Return the micro-batch size, and whether the network re-computes its activations, which is then set up.

    Args:
        policy: the policy of `loadable(config)`.
        config: the recipe's policy.
        algorithm: the recipe's.
        recipe: the recipe.

    Raises:
        ValueError: not even one transition fits, or the network cannot re-compute its activations.
    """
    if config.gradient_checkpointing != "auto":
        return micro_batch_size(policy, config, algorithm, recipe), config.gradient_checkpointing
    if not hasattr(policy.network, "enable_gradient_checkpointing"):
        raise ValueError(
            f'policy.gradient_checkpointing is "auto", and {type(policy.network).__name__} cannot re-compute its '
            "activations: it has no enable_gradient_checkpointing, as diffusers' ModelMixin has; set it to false"
        )
    search = MicroBatchSearch(policy, config.with_checkpointing(False), algorithm, recipe)
    given = recipe.learner.micro_batch_size
    fits = search.largest() >= min(LEAST, search.transitions) if given == "auto" else search.fits(given)
    use_checkpointing(policy.network, not fits)
    print(f"policy.gradient_checkpointing: {'off, its activations fit' if fits else 'on, to save memory'}", flush=True)
    return micro_batch_size(policy, config.with_checkpointing(not fits), algorithm, recipe), not fits


def use_checkpointing(network: Any, on: bool) -> None:
    """Turn gradient checkpointing of a network on or off. Its bits stay the same."""
    if on:
        network.enable_gradient_checkpointing()
    else:
        network.disable_gradient_checkpointing()
