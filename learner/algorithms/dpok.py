"""DPOK (Fan et al. 2023, arXiv 2305.16381): the policy gradient with a KL to the pretrained model and a value baseline."""

from pydantic import Field

from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient
from ray_ddpo.learner.algorithms.value_settings import ValueSettings


class DPOK(ClippedPolicyGradient):
    """DPOK: clipped policy gradient with a KL penalty. The reference is the network with its adapters switched off."""

    kl_coef: float = Field(default=0.01, ge=0)
    """Coefficient of the KL to the pretrained model, on the scale of log-probs: mean over latent elements."""
    value: ValueSettings | None = None
    """Value function whose values are subtracted from the advantages. By default there is none.

    It learns to predict the advantages that `[algorithm.advantages]` computes, so its scale is theirs.
    """

    @property
    def value_settings(self) -> ValueSettings | None:
        return self.value
