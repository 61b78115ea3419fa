"""DPOK (Fan et al. 2023, arXiv 2305.16381): the policy gradient with a KL to the pretrained model; no value network."""

from pydantic import Field

from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient


class DPOK(ClippedPolicyGradient):
    """DPOK. The pretrained model is the same network with its adapters disabled, so no copy is needed."""

    kl_coef: float = Field(default=0.01, ge=0)
