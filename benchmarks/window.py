"""make window: images per second of a round that trains on all steps, a fraction, or SDE windows of 4, 3 and 2."""

import dataclasses
from statistics import median

import numpy as np

from benchmarks.timing import machine, seconds
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.learner.learner import Learner

RECIPE = "deploy/recipes/tiny/jpeg.toml"
REPEATS = 5
ONE_TASK = ["--sampling.batches_per_round", "1", "--runtime.threads", "1", "--learner.micro_batch_size", "16"]
SETTINGS: dict[str, list[str]] = {
    "all steps": ["--sampling.timestep_fraction", "1.0", "--sampling.skip_last_steps", "0"],
    "the recipe's 8 of 15": [],
    **{
        f"window of {size}": ["--sampling.timestep_fraction", "1.0", "--sampling.sde_window", str(size)]
        for size in (4, 3, 2)
    },
}


@dataclasses.dataclass(frozen=True)
class Round:
    """Sampler and learner of one setting, and a round of one task."""

    components: Components
    sampler: Sampler
    learner: Learner

    def times(self) -> tuple[float, float]:
        """Return seconds of sampling and learning for a task. The next call starts from the weights of this one."""
        weights = self.learner.weights()[-1]
        (task,) = round_tasks(self.components.recipe, weights.policy_version, self.components.prompts.load())
        sampled = []
        sampling = seconds(lambda: sampled.extend(self.sampler.sample(task, weights)))
        report, trajectory, _ = sampled
        advantages = np.random.default_rng(0).standard_normal(len(task.seeds))
        batch = TrainBatch(task.round, (report,), advantages)
        return sampling, seconds(lambda: self.learner.update(batch, trajectory))


def round_of(overrides: list[str]) -> Round:
    """Load both sides."""
    components = build_components(Recipe.load(RECIPE, [*ONE_TASK, *overrides]))
    recipe = components.recipe
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
    return Round(components, sampler, Learner(components.policy, components.algorithm, recipe))


def main() -> None:
    """Time all settings in turn, after a warm-up round each, and print the table."""
    rounds = {name: round_of(overrides) for name, overrides in SETTINGS.items()}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in rounds}
    for repeat in range(REPEATS + 1):
        for name, each in rounds.items():
            times = each.times()
            if repeat:
                measured[name].append(times)
    print(f"{machine()}; medians of {REPEATS} interleaved rounds of 16 images; one thread\n")
    print("| learned from | sampling | learning | images/s | against all steps |\n|---|---|---|---|---|")
    whole = median(sum(times) for times in measured["all steps"])
    for name, each in measured.items():
        total = median(sum(times) for times in each)
        sampling, learning = (median(times[side] for times in each) for side in (0, 1))
        print(f"| {name} | {sampling:.2f} s | {learning:.2f} s | {16 / total:.2f} | {whole / total:.2f} × |")


if __name__ == "__main__":
    main()
