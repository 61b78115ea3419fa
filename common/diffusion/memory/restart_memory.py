"""Predict the memory of a learner that takes several denoising steps and decodes with gradients."""

import math
from dataclasses import replace

from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes


def with_restarts(sizes: PolicySizes, steps: int, recompute: bool, weights: int) -> PolicySizes:
    """Return the sizes with the learner's peak by restarts, instead of by transitions.

    If activations are re-computed, those of one step or of the decoder are in memory at a time, beside the latents
    between the steps. Otherwise those of all steps and of the decoder are. The rewards' activations are not counted.

    Args:
        sizes: of the policy.
        steps: that a restart takes at most.
        recompute: whether steps and decoder are re-computed in the backward pass.
        weights: bytes of the decoder's and the rewards' weights.
    """
    decoder = sizes.decoding_gradient or PeakBytes(0, 0)
    # Latents before each step and its noise, in float32.
    between = 2 * 4 * steps * math.prod(sizes.latent_shape)
    step, fixed = sizes.learner.each, sizes.learner.fixed + weights
    if recompute:
        return replace(sizes, learner=PeakBytes(fixed + decoder.fixed, max(step, decoder.each) + between))
    return replace(sizes, learner=PeakBytes(fixed + decoder.fixed, steps * step + decoder.each + between))
