"""DDPO-SF: the score-function estimator, REINFORCE on every denoising step (DDPO, section 4.3)."""

from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.losses import score_function
from ray_ddpo.learner.algorithms.policy_gradient import PolicyGradient


class DDPOScoreFunction(PolicyGradient):
    """DDPO with the score-function estimator. It has no ratio, so it needs on-policy data: one optimizer step, no lag."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        super().check(recipe, policy)
        steps = self.steps_per_round(recipe)
        if steps != 1 or recipe.max_policy_lag:
            raise ValueError(
                f"ddpo_sf is an estimate on fresh data alone, and this recipe has {steps} optimizer steps a round and "
                f"max_policy_lag = {recipe.max_policy_lag}: give learner.batch_size × gradient_accumulation_steps = "
                f"{recipe.images_per_round}, inner_epochs = 1 and max_policy_lag = 0, or use ddpo_is"
            )

    def transition_loss(
        self, transition: Transition, batch: TransitionBatch, advantages: Float[Tensor, "B"]
    ) -> TransitionLoss:
        log_prob = transition.log_prob(batch.next_latents)
        loss = score_function(log_prob, advantages)
        return TransitionLoss(loss, (log_prob - batch.old_log_probs).detach(), terms={"policy": loss})
