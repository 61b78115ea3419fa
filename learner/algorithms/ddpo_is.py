"""DDPO-IS: importance sampling with PPO's clip on every denoising step (DDPO, eq. 4 and section 4.2)."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from common.diffusion.policy import Policy
from common.diffusion.transition import Transition
from common.trajectory import TransitionBatch
from learner.algorithms.algorithm import Algorithm, OffPolicySettings, PairLoss
from learner.off_policy import behaviour_weight, decoupled_surrogate, drift_nats, within_drift


class DDPOImportanceSampling(Algorithm):
    """`clip_range` stands on the scale of `log_prob`, the mean over latent elements; advantages are held within a limit."""

    clip_range: float = Field(default=1e-4, gt=0)
    advantage_clip: float = Field(default=5.0, gt=0)
    off_policy: OffPolicySettings = OffPolicySettings()

    @property
    def needs_proximal_log_probs(self) -> bool:
        return self.off_policy.ratio == "proximal"

    @property
    def needs_behaviour_means(self) -> bool:
        return self.off_policy.max_drift_nats is not None

    def pair_loss(self, policy: Policy, batch: TransitionBatch) -> PairLoss:
        transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
        log_prob = transition.log_prob(batch.next_latents)
        log_ratio = (log_prob - batch.old_log_probs).detach()
        anchor = self._ratios_denominator(log_prob, batch)
        kept = self._kept(transition, batch)
        if kept is not None:  # a masked pair has ratio 1 and no gradient, however far it has moved
            log_prob = torch.where(kept > 0, log_prob, anchor)
        weight = self._weight(anchor, batch)
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        ones = torch.ones_like(anchor)
        loss = decoupled_surrogate(log_prob, anchor, ones if weight is None else weight, advantages, self.clip_range)
        clipped = (((log_prob - anchor).detach().exp() - 1).abs() > self.clip_range).float()
        return PairLoss(loss if kept is None else loss * kept, log_ratio, clipped, kept, weight)

    def _ratios_denominator(self, log_prob: Float[Tensor, "B"], batch: TransitionBatch) -> Float[Tensor, "B"]:
        if self.off_policy.ratio == "behaviour":
            return batch.old_log_probs
        return log_prob.detach() if batch.proximal_log_probs is None else batch.proximal_log_probs

    def _weight(self, anchor: Float[Tensor, "B"], batch: TransitionBatch) -> Float[Tensor, "B"] | None:
        band = self.off_policy.behaviour_weight
        return None if band is None else behaviour_weight(anchor, batch.old_log_probs, band)

    def _kept(self, transition: Transition, batch: TransitionBatch) -> Float[Tensor, "B"] | None:
        limit = self.off_policy.max_drift_nats
        if limit is None:
            return None
        means = transition.mean.detach() if batch.behaviour_means is None else batch.behaviour_means
        return within_drift(drift_nats(transition, Transition(means, transition.std)), limit)
