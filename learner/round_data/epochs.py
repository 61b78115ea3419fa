"""The optimizer steps of a round's inner epochs, as indices of training items."""

import numpy as np
from jaxtyping import Int

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import transition_order
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.round_data.reference_passes import Items
from ray_ddpo.learner.round_data.transitions import Indices, optimizer_steps


def steps_of_epochs(recipe: Recipe, algorithm: Algorithm, batch: TrainBatch, items: Items) -> list[list[Indices]]:
    """Return the optimizer steps of each inner epoch of a round, or of a part of one, in an order by the run's seed."""
    groups = recipe.images_per_round // recipe.prompts.images_per_prompt * (1 + recipe.learner.replay_rounds)
    epochs, places = [], max(1, round(algorithm.images_learned_from(recipe) / groups))
    for inner_epoch in range(recipe.learner.inner_epochs):
        part = (batch.part, batch.parts)
        order = transition_order(recipe.seed, batch.round, inner_epoch, items.num_images, part)
        if algorithm.shares_noise:
            order = by_groups(order, recipe.prompts.images_per_prompt)
        if algorithm.skips_zero_signals:
            order = order[batch.advantages[order] != 0]
        order = with_places_of_dropped(order, batch.dropped, recipe.prompts.images_per_prompt, places)
        positions = items.positions(inner_epoch)
        epochs.append(optimizer_steps(order, recipe.learner.images_per_step, batch.dropped, positions))
    return epochs


def by_groups(order: Int[np.ndarray, "N"], images_per_prompt: int) -> Int[np.ndarray, "N"]:
    """Return an order of images in which groups are complete, each where its first image is in `order`."""
    groups = list(dict.fromkeys((order // images_per_prompt).tolist()))
    return (np.array(groups)[:, None] * images_per_prompt + np.arange(images_per_prompt)).ravel()


def with_places_of_dropped(
    order: Int[np.ndarray, "N"], dropped: tuple[int, ...], images_per_prompt: int, places: int
) -> Int[np.ndarray, "M"]:
    """Return an order of images in which a dropped group has as many places as another one's images that are trained on.

    With all of its images in the order, it would leave steps with few images behind, and an odd group would part the
    images of another one at the end of a step.
    """
    return order[~np.isin(order, dropped) | (order % images_per_prompt < places)]
