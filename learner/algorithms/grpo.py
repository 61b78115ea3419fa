"""GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO): advantages within a prompt's group, optional KL."""

from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient


class GRPO(ClippedPolicyGradient):
    """GRPO. A group is the `prompts.images_per_prompt` images of one prompt in one round. `kl_coef` 0 omits the KL."""

    advantages: AdvantageSettings = AdvantageSettings(kind="group")
    """Computation of advantages from rewards: by default within a group."""
