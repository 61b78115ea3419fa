"""Warn before a run if sampler and learner use different batch sizes on a GPU in half precision."""

import torch

from ray_ddpo.deploy.driver.components import Components


def rows_note(parts: Components) -> str | None:
    """Return the warning with advice; None if the ratio is exactly 1 before the first update or need not be."""
    recipe, policy = parts.recipe, parts.policy
    in_half = {policy.dtype_of("sampler"), policy.dtype_of("learner")} != {torch.float32}
    on_gpu = recipe.runtime.device != "cpu" and bool(recipe.learner.num_gpus or recipe.samplers.num_gpus)
    off_policy = getattr(parts.algorithm, "off_policy", None)
    learner, sampler = recipe.learner.micro_batch_size, recipe.sampling.batch_size
    if not (in_half and on_gpu) or off_policy is None or off_policy.ratio == "proximal" or learner == sampler:
        return None
    return (
        f"learner.micro_batch_size is {learner!r} and sampling.batch_size {sampler}: in half precision a GPU takes "
        "other kernels for other rows, so the ratio is not exactly 1 before the first update (ratio/max_abs_log shows "
        "by how much); give both "
        'the same number, or algorithm.off_policy.ratio = "proximal"'
    )
