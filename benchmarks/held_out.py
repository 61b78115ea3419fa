"""Evaluate versions of the adapters of either side on held-out images, all sampled in the same way."""

from dataclasses import dataclass

import numpy as np

from ray_ddpo.actors.evaluation.eval_set import build_eval_set, sample_eval_images
from ray_ddpo.common.diffusion.lora.adapters import load_weights, trained_parameters
from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.driver.components import build_components


@dataclass(frozen=True)
class Worth:
    """Mean scores over the held-out images."""

    reward: float
    top1: float  # share of the images in which the classifier recognizes the prompt's animal


class Evaluator:
    """The recipe's evaluation set with fixed prompts and noise. The recipe has a scorer `animal_classifier`."""

    def __init__(self, recipe: Recipe) -> None:
        components, device = build_components(recipe), settle(recipe.runtime)
        self._sampling = recipe.sampling
        self._policy = components.policy.load(device, recipe.sampling, "sampler")
        self._chosen = build_eval_set(recipe.evaluation, components.prompts)
        (reward,) = components.rewards.values()
        self._reward = reward.load(device)
        self._classifier = components.scorers["animal_classifier"].load(device)

    def worth(self, arrays: dict[str, np.ndarray] | None) -> Worth:
        """Return the scores of these adapters, keyed by their names in the network.

        None means the pretrained model. Ask for it first: adapters stay in the network.
        """
        if arrays is not None:
            names = trained_parameters(self._policy.network)
            load_weights(self._policy.network, pack(0, {name: arrays[name] for name in names}))
        images = sample_eval_images(self._policy, self._chosen, self._sampling)
        prompts = [prompt.text for prompt in self._chosen.prompts]
        given = (images, prompts, [{} for _ in prompts])
        return Worth(float(self._reward(*given).mean()), float(self._classifier(*given).mean()))
