"""DDPO-IS: importance sampling with PPO's clip on every denoising step (DDPO, eq. 4 and section 4.2)."""

from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient


class DDPOImportanceSampling(ClippedPolicyGradient):
    """DDPO with importance sampling: by default per-prompt advantages, clip range 1e-4, as in ddpo-pytorch and TRL."""
