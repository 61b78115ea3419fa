"""Rows of `ddpo plan` about held-out images: how many a run samples, and how long samplers need for them."""

import math

from ray_ddpo.actors.evaluation.eval_set import images_in_words, num_images
from ray_ddpo.common.diffusion.deterministic_steps import network_steps
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.suite_prompts import followed_prompts
from ray_ddpo.deploy.commands.plan.balance import RATE
from ray_ddpo.deploy.commands.plan.numbers import Plan
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.gpu_layout import device_of, gpus_of
from ray_ddpo.deploy.driver.round_work import image_work

Rows = list[tuple[str, str]]  # name and value


def num_evaluations(recipe: Recipe) -> int:
    """Return how often a run samples its held-out images. With a moving average, each version but 0 counts twice."""
    if not recipe.evaluation.every:
        return 0
    due = math.ceil(recipe.rounds / recipe.evaluation.every)  # the last round is always evaluated
    return 1 + due * (1 if recipe.evaluation.ema_decay is None else 2)


def evaluation_rows(components: Components, numbers: Plan) -> Rows:
    """Return the held-out images of a run and of an evaluation, with the share that they add and their time."""
    recipe, table, times = components.recipe, components.recipe.evaluation, num_evaluations(components.recipe)
    suite = table.followed
    prompts = 0 if suite is None else len(followed_prompts(table))  # of the source, a plan needs no file
    images = num_images(table, prompts)
    named = images_in_words(images, suite, 0 if suite is None else suite.all_images(prompts))
    if not times:
        return [("held-out images", f"{named}, in the report only")]
    total = times * images
    share = total / (numbers.images * recipe.rounds)
    said = f"{total} = {times} × {named}; {share:.0%} of the images in total come on top"
    return [("held-out images", said), *_time_rows(components, numbers, math.ceil(images / table.batch_size))]


def _time_rows(components: Components, numbers: Plan, tasks: int) -> Rows:
    """Return the seconds of an evaluation at RATE; no rows without GPUs, or if the family's work is not counted."""
    recipe, work = components.recipe, image_work(components, numbers.sizes)
    if device_of(recipe) == "cpu" or not work.is_counted:
        return []
    sampling = recipe.held_out_sampling
    calls = len(network_steps(range(sampling.num_steps), sampling.cache_interval))
    samplers = max(1, min(recipe.samplers.count, gpus_of(recipe)))
    each = recipe.evaluation.batch_size * work.sampling_with(calls) / RATE
    seconds = math.ceil(tasks / samplers) * each
    return [
        (
            "time of an evaluation",
            f"{seconds:.3g} s at {RATE / 1e12:g} TFLOP/s a GPU, of {samplers} "
            f"sampler{'s' * (samplers > 1)}; scoring is not counted",
        )
    ]
