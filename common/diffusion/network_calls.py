"""Network calls per image of a training task, with what a cache and shared prefixes save."""

from ray_ddpo.common.diffusion.deterministic_steps import network_steps
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import sde_window_of_round

MOST_ROUNDS = 1000  # followed for the mean over positions of the window


def calls_per_image(recipe: Recipe, window: range | None) -> float:
    """Return the network's calls per sampled image, with and without the prompt counted as one.

    A prefix is computed once for the images of a group in a task. Stochastic steps are taken twice if their KL to the
    pretrained model is subtracted from the reward.

    Args:
        recipe: the recipe.
        window: the round's SDE window. None: all steps are stochastic.
    """
    sampling = recipe.sampling
    passes = 2 if sampling.kl_reward else 1
    if recipe.prompts.name == "preferences":  # images are encoded, beside one step that proves the weights
        return 1.0
    if window is None:
        return float(passes * sampling.num_steps)
    if sampling.deterministic:
        return float(len(network_steps(range(sampling.num_steps), sampling.cache_interval)))
    # DPM-Solver++ calls the network at every step, and a recipe has no cache beside it.
    before, after = (
        len(network_steps(run, sampling.cache_interval))
        for run in (range(window.start), range(window.stop, sampling.num_steps))
    )
    sharing = min(recipe.prompts.images_per_prompt, sampling.batch_size) if sampling.shared_prefix else 1
    return before / sharing + passes * len(window) + after


def mean_calls_per_image(recipe: Recipe) -> float:
    """Return the mean of the network's calls per sampled image over the positions of the run's windows."""
    calls = [
        calls_per_image(recipe, sde_window_of_round(recipe, each)) for each in range(min(recipe.rounds, MOST_ROUNDS))
    ]
    return sum(calls) / len(calls)
