"""Sample beyond a round's usual tasks: further groups for those without spread, and trajectories that were lost."""

from itertools import groupby

from ray_ddpo.common.group_spread import Refill
from ray_ddpo.common.prompts import SamplePrompt
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import Rollout, Scored
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.workers import Workers


def collected_rollouts(
    components: Components, workers: Workers, round_index: int, tasks: range, sample: SamplePrompt
) -> list[Rollout]:
    """Wait for the tasks of a round, or of a part of it. Return their rollouts and those that refill the round."""
    return refilled(components, workers, workers.stream.collect(round_index, tasks), sample)


def refilled(components: Components, workers: Workers, rollouts: list[Rollout], sample: SamplePrompt) -> list[Rollout]:
    """Return a round's rollouts, followed by those of further groups if the algorithm asks for them."""
    recipe, attempts = components.recipe, components.algorithm.refill_attempts
    refill, round_index = Refill.of(recipe, attempts), rollouts[0].report.task.round
    for _ in range(attempts):
        further = refill.further_tasks(rollouts)
        if not further:
            break
        workers.submit(round_tasks(recipe, round_index, sample, further))
        rollouts = [*rollouts, *workers.stream.collect(round_index, further)]
    return rollouts


def sampled_again(workers: Workers, scored: list[Scored]) -> list[Scored]:
    """Sample all tasks of a round's parts again, to the same bits, because trajectories were lost with their node.

    Advantages stay. All tasks are submitted before the first is waited for. Parts may hold tasks of several rounds.
    """
    parts = [[rollout.report.task for rollout in rollouts] for _, rollouts in scored]
    for _, of_round in groupby((task for tasks in parts for task in tasks), lambda task: task.round):
        workers.submit(list(of_round))
    found = []
    for (batch, _), tasks in zip(scored, parts, strict=True):
        again: list[Rollout] = []
        for round_index, of_round in groupby(tasks, lambda task: task.round):
            indices = [task.index for task in of_round]
            again += workers.stream.collect(round_index, range(indices[0], indices[-1] + 1))
        found.append((batch, again))
    return found
