"""Check that a recipe's learner can shard its weights."""

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.sharding.layout import shards_weights
from ray_ddpo.learner.weight_check import computes_as_samplers


def check_sharding(recipe: Recipe, policy: PolicyConfig) -> None:
    """Check the policy's keys, if the recipe shards the learner's weights.

    Raises:
        ValueError: sharded weights cannot be combined with a key.
    """
    learner = recipe.learner
    if learner.offload_weights and not learner.shard_weights:
        raise ValueError("learner.offload_weights is true and shard_weights false: only a rank's shard is offloaded")
    if not shards_weights(learner):
        return
    if learner.optimizer != "adamw":
        raise ValueError(
            f"learner.shard_weights is true and learner.optimizer {learner.optimizer!r}: its blocks of numbers would "
            'cross the ranks\' shards; give "adamw", whose state is sharded too'
        )
    if 0 < learner.num_gpus <= 0.5:
        raise ValueError(
            f"learner.shard_weights is true and learner.num_gpus {learner.num_gpus:g}, with which ranks may share a "
            "GPU: give each rank a GPU of its own, or none"
        )
    if policy.joined_parts:  # each transition needs one of two networks
        raise ValueError(
            "learner.shard_weights is true, and policy.expert says that two networks are trained: a rank at steps of one "
            "would wait for ranks at steps of the other; give one expert, or leave shard_weights out"
        )
    if policy.compile == "both":
        raise ValueError(
            'learner.shard_weights is true and policy.compile "both": a compiled learner cannot gather its weights '
            'block by block; give "none"'
        )
    if policy.cuda_graphs is True:
        raise ValueError(
            "learner.shard_weights is true and policy.cuda_graphs too: a recorded graph would not gather the learner's "
            'weights block by block; give cuda_graphs = "auto", which replays graphs in samplers alone'
        )
    if learner.offload_weights and policy.dtype == "float16":
        raise ValueError(
            'learner.offload_weights is true and policy.dtype "float16", whose gradients are scaled on the GPU: give '
            '"bfloat16"'
        )
    if not computes_as_samplers(policy, recipe):
        raise ValueError(
            "learner.shard_weights is true, and samplers compute otherwise than the learner: their log-probs are checked "
            "by a second copy of the full network, which no rank has memory for; leave out policy.sampler_dtype, "
            "policy.merge_adapters and, in half precision, policy.compile"
        )
