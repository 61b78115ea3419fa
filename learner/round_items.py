"""The training items of a round: transitions, noised samples, or restarts that are checked against the sampler's images."""

from dataclasses import dataclass

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.restart_check import refuse_difference, restart_error
from ray_ddpo.learner.round_data.noised_samples import training_items
from ray_ddpo.learner.round_data.reference_passes import Items
from ray_ddpo.learner.round_data.restarts import restarts_of
from ray_ddpo.learner.round_data.transitions import RoundTransitions
from ray_ddpo.learner.temporary_weights import HeldWeights, temporary_weights
from ray_ddpo.learner.update_metrics import UpdateMetrics


@dataclass(frozen=True)
class RoundItems:
    """What makes the training items of a learner's rounds."""

    policy: Policy
    config: PolicyConfig
    algorithm: Algorithm
    recipe: Recipe
    process_group: ProcessGroup

    def make(
        self,
        batch: TrainBatch,
        transitions: RoundTransitions,
        weights: tuple[HeldWeights, HeldWeights],
        metrics: UpdateMetrics,
    ) -> Items:
        """Return the training items of a round, or of a part of it.

        Args:
            batch: the round.
            transitions: its sampled steps.
            weights: those that the round was sampled with, and those of the learner's network.
            metrics: take the result of the check of restarts.

        Raises:
            RestartDiffers: the learner's last steps make other images than the sampler's.
        """
        if not isinstance(self.algorithm, RewardGradient):
            group = self.recipe.prompts.images_per_prompt
            return training_items(self.algorithm, batch, transitions, self.policy.num_train_timesteps, group)
        per_image = self.algorithm.restarts_per_image
        restarts = restarts_of(per_image, batch, transitions, self.policy, self.recipe.sampling)
        with self.process_group.raise_on_all_ranks(), temporary_weights(self.policy.network, *weights):
            found = restart_error(self.policy, self.algorithm, restarts, batch)
            if found is not None:
                refuse_difference(found, self.algorithm, self.config, batch)
                metrics.set_restart(found)
        return restarts


def executed_config(config: PolicyConfig, algorithm: Algorithm) -> PolicyConfig:
    """Return the learner's policy without CUDA graphs, if the activations of several passes must be kept."""
    return config if algorithm.restarts_per_image is None else config.model_copy(update={"cuda_graphs": False})
