"""Measure the cost of an image under each algorithm: rounds of 64 images, interleaved in one process.

The study's own runs share the machine with each other and with other programs, so their clocks cannot be compared.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.timing import machine, seconds
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import Rollout
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer

ROUND_IMAGES = 64
REPEATS = 2
COSTS = Path("docs/algorithm_study_costs.json")


@dataclass
class Rounds:
    """Sequential rounds of one recipe in this process."""

    components: Components
    sampler: Sampler
    worker: RewardWorker
    learner: Learner
    buffer: RoundBuffer
    round: int = 0

    @classmethod
    def of(cls, path: str) -> "Rounds":
        """Load a recipe and limit its rounds to 64 images."""
        components = build_components(Recipe.load(path, ["--runtime.threads", "1"]))
        if components.recipe.images_per_round > ROUND_IMAGES:
            tasks = ROUND_IMAGES // components.recipe.sampling.batch_size
            words = ["--runtime.threads", "1", "--sampling.batches_per_round", str(tasks)]
            components = build_components(Recipe.load(path, words))
        recipe = components.recipe
        return cls(
            components,
            Sampler(components.policy, recipe.sampling, recipe.runtime),
            RewardWorker(components.rewards, recipe.reward_workers, recipe.runtime),
            Learner(components.policy, components.algorithm, recipe),
            RoundBuffer(components.algorithm, components.aggregation, recipe.prompts.images_per_prompt),
        )

    def next_round(self) -> None:
        """Run one round: prompts → sampler → reward → advantages → learner → weights."""
        weights, rollouts = self.learner.weights()[-1], []
        for task in round_tasks(self.components.recipe, self.round, self.components.prompts.load()):
            report, trajectory, images = self.sampler.sample(task, weights)
            assert report is not None and images is not None
            rollouts.append(Rollout(report, self.worker.score(images), trajectory, None))
        batch = self.buffer.train_batch(rollouts)
        self.learner.update(batch, *(rollout.trajectory for rollout in rollouts))
        self.round += 1

    def seconds_per_image(self) -> float:
        """Time enough rounds for 64 images and return seconds per image."""
        count = max(1, ROUND_IMAGES // self.components.recipe.images_per_round)
        taken = sum(seconds(self.next_round) for _ in range(count))
        return taken / (count * self.components.recipe.images_per_round)


def measure(recipes: dict[str, str], path: Path, repeats: int = REPEATS) -> dict[str, float]:
    """Return seconds per image by name, medians of interleaved repeats after a warm-up. Write them to `path`."""
    prepared = {name: Rounds.of(recipe) for name, recipe in recipes.items()}
    taken: dict[str, list[float]] = {name: [] for name in recipes}
    for each in prepared.values():
        each.next_round()
    for _ in range(repeats):
        for name, each in prepared.items():
            taken[name].append(each.seconds_per_image())
    costs = {name: round(median(times), 4) for name, times in taken.items()}
    path.write_text(json.dumps({"seconds an image": costs, "machine": machine()}, indent=1) + "\n")
    return costs


def read_costs(path: Path) -> dict[str, float]:
    """Return the measured costs by algorithm."""
    return json.loads(path.read_text())["seconds an image"]


def main() -> None:
    """Measure and print the costs."""
    from benchmarks.algorithm_study import all_runs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, default=COSTS)
    costs = measure({run.setting: run.recipe for run in all_runs()}, parser.parse_args().costs)
    for name, each in costs.items():
        print(f"{name:<16} {each:.3f} s an image")


if __name__ == "__main__":
    main()
