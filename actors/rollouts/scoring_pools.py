"""ScoringPools: score sampled tasks with several pools of reward workers, and merge their scores."""

from typing import Any

from ray_ddpo.actors.rollouts.sampling_scheduler import SampledTask
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringOutcome, ScoringPool, ScoringScheduler
from ray_ddpo.common.schedule import Place
from ray_ddpo.common.trajectory import Scores, merged_scores, unscored


class ScoringPools:
    """Several pools with the interface of a single `ScoringScheduler`. A task is done when all its pools are."""

    def __init__(self, pools: tuple[ScoringPool, ...], retries: dict[str, int]) -> None:
        self._asked = pools
        self._pools = tuple(ScoringScheduler(pool, retries) for pool in pools)
        self._scores: dict[Place, dict[int, Scores]] = {}  # of unfinished tasks, by the pool's number

    def submit(self, sampled: SampledTask) -> ScoringOutcome:
        """Queue a sampled task with every pool that scores it. A task without any image is done at once."""
        report, concerned = sampled.report, self._concerned(sampled)
        if len(report.dropped) == len(report.task.seeds):
            names = [name for number in concerned for name in self._asked[number].names]
            return ScoringOutcome(scored=((sampled, unscored(names, report)),))
        for number in concerned:
            self._pools[number].submit(sampled)
        return ScoringOutcome()

    def _concerned(self, sampled: SampledTask) -> list[int]:
        return [number for number, pool in enumerate(self._asked) if pool.scores(sampled.report.task)]

    def references(self) -> list[Any]:
        """Return the references to wait for."""
        return [reference for pool in self._pools for reference in pool.references()]

    def holds(self, reference: Any) -> bool:
        """Return whether a reference is of a call to one of the pools."""
        return any(pool.holds(reference) for pool in self._pools)

    def move(self, now: float) -> None:
        """Do what is due in every pool."""
        for pool in self._pools:
            pool.move(now)

    def finished(self, reference: Any, now: float) -> ScoringOutcome:
        """Process a finished call, and return the tasks that all pools have scored, with merged scores."""
        number = next(number for number, pool in enumerate(self._pools) if pool.holds(reference))
        outcome = self._pools[number].finished(reference, now)
        for sampled in outcome.lost:
            self._scores.pop(sampled.report.task.place, None)
            for pool in self._pools:
                pool.forget(sampled)
        scored = [(sampled, self._merged(sampled, number, scores)) for sampled, scores in outcome.scored]
        return ScoringOutcome(tuple((sampled, scores) for sampled, scores in scored if scores), outcome.lost)

    def _merged(self, sampled: SampledTask, number: int, scores: Scores) -> Scores | None:
        """Add a pool's scores of a task. Return the merged scores, or None while other pools are missing."""
        place = sampled.report.task.place
        of_task = self._scores.setdefault(place, {})
        of_task[number] = scores
        concerned = self._concerned(sampled)
        if len(of_task) < len(concerned):
            return None
        del self._scores[place]
        return merged_scores([of_task[number] for number in concerned])

    def waiting_for(self) -> list[str]:
        """List waiting images and running batches, for the watchdog's dump."""
        return [line for pool in self._pools for line in pool.waiting_for()]
