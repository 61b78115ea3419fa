"""The replay buffer: the last rounds' images, which are trained on again with each round."""

from collections import deque
from dataclasses import replace

import numpy as np

from ray_ddpo.common.prompts import SamplePrompt
from ray_ddpo.common.schedule import round_parts, round_tasks
from ray_ddpo.common.trajectory import Rollout, Scored, TrainBatch
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.resampling import collected_rollouts
from ray_ddpo.deploy.driver.workers import Workers
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer


class ReplayBuffer:
    """The last `learner.replay_rounds` rounds with their advantages. On Ray it holds references to trajectories.

    A checkpoint has no trajectories. A resumed run samples these rounds again under the versions that sampled them,
    which the learner keeps, and scores them again: sampling, scores and advantages have the same bits.
    """

    def __init__(self, components: Components, workers: Workers, buffer: RoundBuffer, sample: SamplePrompt) -> None:
        """Make an empty buffer."""
        self._components = components
        self._workers = workers
        self._buffer = buffer
        self._sample = sample
        self._rounds: deque[Scored] = deque(maxlen=components.recipe.learner.replay_rounds)

    def restore(self, rounds_done: int) -> "ReplayBuffer":
        """Sample the rounds again that the buffer held after `rounds_done` rounds. Return the buffer."""
        recipe = self._components.recipe
        rounds = range(max(0, rounds_done - recipe.learner.replay_rounds), rounds_done)
        for round_index in rounds:
            self._workers.submit(round_tasks(recipe, round_index, self._sample))
        for round_index in rounds:
            (tasks,) = round_parts(recipe)
            rollouts = collected_rollouts(self._components, self._workers, round_index, tasks, self._sample)
            self.add([(self._buffer.train_batch(rollouts), rollouts)])
        return self

    def joined(self, scored: list[Scored]) -> list[Scored]:
        """Return a round's parts, the last one followed by the images of the buffer."""
        return [*scored[:-1], with_replayed(scored[-1], list(self._rounds))]

    def add(self, scored: list[Scored]) -> None:
        """Add a round that was trained on, without its images."""
        if self._rounds.maxlen:
            ((batch, rollouts),) = scored
            self._rounds.append((batch, [replace(rollout, images=None) for rollout in rollouts]))


def with_replayed(current: Scored, earlier: list[Scored]) -> Scored:
    """Return a round followed by earlier rounds, as one batch of the current round's number."""
    if not earlier:
        return current
    scored, dropped, first = [current, *earlier], [], 0
    for batch, _ in scored:
        dropped += [first + image for image in batch.dropped]
        first += len(batch.advantages)
    joined = TrainBatch(
        current[0].round,
        tuple(report for batch, _ in scored for report in batch.reports),
        np.concatenate([batch.advantages for batch, _ in scored]),
        tuple(dropped),
    )
    rollouts: list[Rollout] = [rollout for _, of_round in scored for rollout in of_round]
    return joined, rollouts
