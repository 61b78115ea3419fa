"""RoundBuffer: turn a round's scored rollouts into a batch with the algorithm's advantages."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float

from ray_ddpo.common.group_spread import Refill
from ray_ddpo.common.trajectory import Rollout, TrainBatch, path_kls, thumbnail_rows
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.reward_aggregation import AggregatedAdvantages, RewardAggregation, Statistics

GATE = "gate"  # in the statistics: the history of the gate of a KL


class TooManyDropped(RuntimeError):
    """The run dropped more images than it may, or all images of a round."""


class RoundBuffer:
    """The advantage statistics of a run, and the images that were dropped.

    If an image of a group cannot be scored, the entire group is dropped.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        aggregation: RewardAggregation,
        images_per_prompt: int = 1,
        max_dropped: int | None = None,
        parts_per_round: int = 1,
        refill: Refill | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._aggregation = aggregation
        self._group = images_per_prompt
        self._max_dropped = max_dropped
        self._parts = parts_per_round
        self._refill = refill  # None: a round trains on all groups that are not dropped
        self._reasons: list[str] = []  # why images were dropped in this process, the newest last
        self.statistics: Statistics = {}  # in the checkpoint
        self.dropped: dict[int, list[int]] = {}  # in the checkpoint: round → images, numbered in task order

    def train_batch(self, rollouts: list[Rollout]) -> TrainBatch:
        """Compute the advantages of a round, or of its next part, in task order.

        The statistics contain no later rewards than these. Images of the round that were dropped before are dropped
        again, so that training on a round twice gives the same bits.

        Raises:
            TooManyDropped: the run dropped more images than it may, or all images of the round.
        """
        tasks = [rollout.report.task for rollout in rollouts]
        part = tasks[0].index // len(tasks)
        in_order = range(part * len(tasks), (part + 1) * len(tasks))
        assert [task.index for task in tasks] == list(in_order), "a round is trained on in task order"
        assert part < self._parts, "a round has no more parts than the recipe says"
        assert len({task.round for task in tasks}) == 1, "a round's tasks are of one round"
        prompts = [prompt.key for task in tasks for prompt in task.prompts]
        kept = self._kept(tasks[0].round, part, rollouts)
        history = self.statistics.get(GATE, {})
        trained = self._refill.trained_images(rollouts) if self._refill else np.ones(len(kept), bool)
        found = self._advantages(prompts, rollouts, kept & trained)
        found.advantages[kept & ~trained] = 0.0  # left out as images with signal 0
        gate = self._gate(history, rollouts, kept & trained)
        reports = tuple(rollout.report for rollout in rollouts)
        dropped = tuple(np.flatnonzero(~kept).tolist())
        batch = TrainBatch(tasks[0].round, reports, found.advantages, dropped, part, self._parts, found.parts)
        return replace(batch, kl_weights=gate)

    def _advantages(
        self, prompts: list[str], rollouts: list[Rollout], kept: Bool[np.ndarray, "N"]
    ) -> AggregatedAdvantages:
        """Compute the advantages of the images that are kept, NaN for the others."""
        everywhere = {name: np.full(len(prompts), np.nan) for name in self._aggregation.compared}
        found = AggregatedAdvantages(np.full(len(prompts), np.nan), everywhere)
        if kept.any():
            scores = [rollout.scores.rewards for rollout in rollouts]
            rewards = {
                name: np.concatenate([each[name] for each in scores])[kept] for name in self._aggregation.weights
            }
            finite = all(np.isfinite(values).all() for values in rewards.values())
            assert finite, "an image without a finite reward is dropped with its reason"
            texts = [prompt for prompt, is_kept in zip(prompts, kept, strict=True) if is_kept]
            path_kl = path_kls(rollouts)[kept] if self._aggregation.kl_reward else None
            self.statistics, of_kept = self._aggregation.compute_advantages(
                self._algorithm, self.statistics, texts, rewards, self._group, path_kl
            )
            shaped = self._algorithm.shape_advantages(of_kept.advantages, thumbnail_rows(rollouts)[kept], self._group)
            found.advantages[kept] = shaped
            for name, values in of_kept.parts.items():
                everywhere[name][kept] = values
        return found

    def _gate(
        self, history: PromptStatistics, rollouts: list[Rollout], kept: Bool[np.ndarray, "N"]
    ) -> Float[np.ndarray, "N"] | None:
        """Return the factors of the images' KL to the reference, 0 for dropped ones; None: all are 1."""
        scores, weights = [rollout.scores.rewards for rollout in rollouts], self._aggregation.weights
        rewards = {name: np.concatenate([each[name] for each in scores])[kept].astype(np.float64) for name in weights}
        trained = np.sum([weight * rewards[name] for name, weight in weights.items() if weight], axis=0)
        auxiliary = {name: rewards[name] for name, weight in weights.items() if not weight}
        extended, of_kept = self._algorithm.gate_kl(history, trained, auxiliary)
        if of_kept is None:
            return None
        self.statistics = self.statistics | {GATE: extended}
        factors = np.zeros(len(kept))
        factors[kept] = of_kept
        return factors

    def _kept(self, round_index: int, part: int, rollouts: list[Rollout]) -> Bool[np.ndarray, "N"]:
        """Return the mask of the part's images that are not dropped.

        Raises:
            TooManyDropped: too few are left.
        """
        count = sum(len(rollout.report.task.seeds) for rollout in rollouts)
        images, first = list(self.dropped.get(round_index, [])), part * count
        for rollout in rollouts:
            images += [first + row for row in rollout.scores.dropped]
            self._reasons += rollout.scores.dropped.values()
            first += len(rollout.report.task.seeds)
        groups = {image // self._group for image in images}
        kept = np.array([image // self._group not in groups for image in range(count * self._parts)])
        if groups:
            self.dropped[round_index] = np.flatnonzero(~kept).tolist()
        self._refuse_too_few(round_index, kept)
        return kept[part * count : (part + 1) * count]

    def _refuse_too_few(self, round_index: int, kept: Bool[np.ndarray, "N"]) -> None:
        """Raise TooManyDropped if the run dropped too many images, or if none of the round is left."""
        total = sum(len(of_round) for of_round in self.dropped.values())
        reasons = "; ".join(list(dict.fromkeys(reversed(self._reasons)))[:3]) or "said when they were dropped"
        if self._max_dropped is not None and total > self._max_dropped:
            raise TooManyDropped(
                f"{total} images of this run are dropped, whole groups of {self._group} counted, and at most "
                f"{self._max_dropped} may be; the reasons: {reasons}"
            )
        if not kept.any():
            raise TooManyDropped(
                f"all {len(kept)} images of round {round_index} are dropped: nothing is left to learn from; the "
                f"reasons: {reasons}"
            )
