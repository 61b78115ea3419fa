"""List the places where the host waits for the GPU during a round. There should be none inside a micro-batch.

Usage: python -m benchmarks.gpu_waits RECIPE ANSWERS.jsonl [--override value …]. Each place appends one line.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.learner.learner import Learner

SHORTER = ["--sampling.num_steps", "4"]


def main(recipe: str, answers: str, overrides: list[str]) -> None:
    """Watch the second round. The first one allocates and pins memory."""
    components = components_of(Recipe.load(recipe, [*overrides, *SHORTER]))
    sampler = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    learner = Learner(components.policy, components.algorithm, components.recipe)
    micro_batches = components.recipe.images_per_round * 4 // learner.state().micro_batch_size  # type: ignore[operator]
    for round_index in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if round_index and torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
            weights = learner.weights()[-1]
            sampled = [
                sampler.sample(task, weights)[:2]
                for task in round_tasks(components.recipe, round_index, components.prompts.load())
            ]
            advantages = np.random.default_rng(0).standard_normal(components.recipe.images_per_round)
            batch = TrainBatch(round_index, tuple(report for report, _ in sampled if report), advantages)
            learner.update(batch, *(trajectory for _, trajectory in sampled if trajectory))
    places = Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)
    )
    with Path(answers).open("a") as file:
        for place, times in places.most_common():
            file.write(json.dumps({"place": place, "times": times, "micro_batches": micro_batches}) + "\n")
    print(f"{sum(places.values())} waits in a round of {micro_batches} micro-batches: {dict(places)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
