"""DDPO-IS: importance sampling with PPO's clip on every denoising step (DDPO, eq. 4 and section 4.2)."""

from pydantic import Field

from common.diffusion.policy import Policy
from common.trajectory import TransitionBatch
from learner.algorithms.algorithm import Algorithm, PairLoss
from learner.losses import clipped_surrogate


class DDPOImportanceSampling(Algorithm):
    """`clip_range` stands on the scale of `log_prob`, the mean over latent elements; advantages are held within a limit."""

    clip_range: float = Field(default=1e-4, gt=0)
    advantage_clip: float = Field(default=5.0, gt=0)

    def pair_loss(self, policy: Policy, batch: TransitionBatch) -> PairLoss:
        log_prob = policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        loss = clipped_surrogate(log_prob, batch.old_log_probs, advantages, self.clip_range)
        log_ratio = (log_prob - batch.old_log_probs).detach()
        clipped = ((log_ratio.exp() - 1).abs() > self.clip_range).float()
        return PairLoss(loss, log_ratio, clipped)
