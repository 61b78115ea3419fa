"""The evaluation's images under any weights, scored by all that the recipe names: what `ddpo report` and `evaluate` compare."""

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import evaluation_images, evaluation_set
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.run_storage.evaluation_log import EvaluatedImages
from ray_ddpo.common.trajectory import ImageBatch
from ray_ddpo.deploy.driver.components import Components

JOINED = "reward"  # the weighted sum, among the scores


class HeldOut:
    """Prompts and noise stay the same, so two sets of images are compared image by image."""

    def __init__(self, parts: Components) -> None:
        recipe = parts.recipe
        self.chosen = evaluation_set(recipe.evaluation, parts.prompts)
        self._sampling = recipe.sampling
        self._worker = RewardWorker(parts.rewards | parts.scorers, recipe.reward_workers, recipe.runtime)
        self._weights = parts.aggregation.weights

    def loaded_parts(self) -> Base:
        """Return the fingerprints of what the images are scored with."""
        return self._worker.loaded_parts()

    def images(self, policy: Policy) -> EvaluatedImages:
        """The images under the policy's present weights, and their scores; NaN where one has none."""
        pixels = evaluation_images(policy, self.chosen, self._sampling)
        scores = self._worker.score(ImageBatch(pixels, self.chosen.prompts)).rewards
        joined = np.sum([weight * scores[name] for name, weight in self._weights.items()], axis=0)
        return EvaluatedImages(self.chosen.prompts, self.chosen.seeds, {**scores, JOINED: joined}, pixels)


def scorers_of(recipe: Recipe) -> dict[str, RewardTable]:
    """All rewards and scorers by what they are called: first those that are trained on."""
    return {table.called: table for table in (*recipe.all_rewards, *recipe.evaluation.scorers)}
