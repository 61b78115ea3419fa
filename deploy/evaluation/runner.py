"""Evaluating: versions of the policy are sampled and scored on held-out images beside the training, judged, and the best is kept.

Which version is evaluated, and in which round its scores are read, follows from the schedule and not from timing: so the guard
decides alike for any number of samplers and after any resume.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import evaluation_set
from ray_ddpo.actors.evaluation.image_summary import image_summary
from ray_ddpo.actors.rollouts.stream import RolloutStream
from ray_ddpo.common.policy_weights import PolicyWeights, averaged
from ray_ddpo.common.run_storage.evaluation_log import EvaluatedImages, EvaluationLog
from ray_ddpo.common.run_storage.run_folder import GUARD, RunFolder
from ray_ddpo.common.schedule import Stream, Task, last_startable_round
from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.workers import Workers
from ray_ddpo.deploy.evaluation.best_version import BestVersion
from ray_ddpo.deploy.evaluation.guard import Judged, is_over
from ray_ddpo.deploy.evaluation.media import evaluation_media
from ray_ddpo.deploy.evaluation.results import Verdict, as_judged, as_metrics, figures_of, identity_of
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint
from ray_ddpo.learner.checkpoints.learner_state import Evaluated, EvaluationState

Metrics = dict[str, float]


@dataclass(frozen=True)
class _PendingVersion:
    """A version whose images are being sampled: its tasks by what they are sampled with, in that round's order."""

    version: Evaluated
    round: int  # it is sampled behind what is learned from in this round, and read when that is learned from
    tasks: dict[str, list[Task]]

    def weights(self, variant: str) -> PolicyWeights:
        average = self.version.average
        return average if variant == "average" and average is not None else self.version.current


class Evaluating:
    """The driver's side of `[evaluation]` and `[guard]`; where `evaluation.every` is 0 it does nothing."""

    def __init__(self, parts: Components, folder: RunFolder, workers: Workers, trackers: FanOut) -> None:
        self._parts = parts
        self._table = parts.recipe.evaluation
        self._stream: RolloutStream = workers.stream
        self._chosen = evaluation_set(self._table, parts.prompts)
        self._identity = identity_of(parts.recipe, self._chosen)
        self._folder = folder
        self._trackers = trackers
        self._log = EvaluationLog(folder.storage, folder.unwritten)
        self._best = BestVersion(folder, workers.learner, parts.recipe.guard)
        self._pending: list[_PendingVersion] = []
        self._waiting: list[Evaluated] = []  # due, and not submitted yet
        self._average: PolicyWeights | None = None
        self._verdicts: list[Verdict] = []

    def begin(self, pretrained: PolicyWeights, checkpoint: Checkpoint | None) -> None:
        """Before the first round of this start: what is known of earlier versions, and which of them are still to be sampled."""
        if not self._table.every:
            return
        rounds_done = checkpoint.rounds_done if checkpoint else 0
        newest = checkpoint.learner.weights[-1] if checkpoint else pretrained
        state = checkpoint.evaluation if checkpoint else EvaluationState()
        known = [each for each in self._log.figures() if each["policy_version"] <= rounds_done]
        if any(each["set"] != self._identity for each in known):
            print("evaluation: other images or scorers than before: begun again", file=sys.stderr, flush=True)
            known = []
        self._log.keep(known)
        self._verdicts = [Verdict.of(each, self._log.scores(each["policy_version"])) for each in known]
        self._average = (state.average or newest) if self._table.average_decay else None
        done = {verdict.policy_version for verdict in self._verdicts}
        due = {} if 0 in done else {0: Evaluated(pretrained)}
        if self._table.is_due(
            rounds_done, self._parts.recipe.rounds
        ):  # it was not asked for when that checkpoint was made
            due[rounds_done] = Evaluated(newest, self._average)
        due |= {each.policy_version: each for each in state.pending}
        self._waiting = [due[version] for version in sorted(due.keys() - done)]

    def learned(self, published: PolicyWeights, kl_reference_nats: float | None) -> None:
        """A version was published."""
        if self._average is not None and self._table.average_decay is not None:
            self._average = averaged(self._average, published, self._table.average_decay)
        self._note(published, kl_reference_nats)

    def _note(self, published: PolicyWeights, kl_reference_nats: float | None) -> None:
        if self._table.is_due(published.policy_version, self._parts.recipe.rounds):
            self._waiting.append(Evaluated(published, self._average, kl_reference_nats))

    @property
    def state(self) -> EvaluationState:
        """For the checkpoint."""
        pending = [each.version for each in self._pending] + self._waiting
        return EvaluationState(self._average, tuple(pending))

    @property
    def is_over(self) -> bool:
        """Whether the guard ends the run here."""
        return is_over(self._judged(), self._parts.recipe.guard)

    def _judged(self) -> list[Judged]:
        return [as_judged(verdict, self._parts.recipe.guard) for verdict in self._verdicts]

    def submit(self, rounds_done: int) -> None:
        """Hand the versions that are due to the samplers, behind the rounds that are under way."""
        lag = self._parts.recipe.max_policy_lag
        for version in self._waiting:
            round = max(rounds_done, last_startable_round(version.policy_version, lag))
            first = sum(len(tasks) for each in self._pending if each.round == round for tasks in each.tasks.values())
            tasks = {}
            for variant in ("current", "average") if version.average is not None else ("current",):
                tasks[variant] = self._chosen.tasks(version.policy_version, round, first, self._parts.recipe.sampling)
                first += self._chosen.num_tasks
            self._pending.append(_PendingVersion(version, round, tasks))
            self._ask(self._pending[-1])
        self._waiting = []

    def end(self) -> None:
        """After the run's last round: where the guard has ended it, say so, and put the best weights in place if asked for."""
        if not self.is_over:
            self._folder.storage.remove(GUARD)
            return
        alarms = [alarm.says for alarm in self._verdicts[-1].alarms]
        ended = {"policy_version": self._verdicts[-1].policy_version, "alarms": alarms, "weights_of": None}
        says = f"guard: the run ends here, as guard.on_alarm = {self._parts.recipe.guard.on_alarm!r} asks"
        if self._parts.recipe.guard.on_alarm == "roll_back":
            ended["weights_of"] = self._best.roll_back()
            says += f"; its weights are those of version {ended['weights_of']}"
        self._folder.storage.write(GUARD, json.dumps(ended, indent=1).encode())
        print(says, file=sys.stderr, flush=True)

    def _ask(self, pending: _PendingVersion) -> None:
        for variant, tasks in pending.tasks.items():
            self._stream.submit(tasks, pending.weights(variant))

    def read(self, round: int) -> Metrics:
        """What was found of the versions whose time has come, as metrics of the last of them; nothing where there is none.

        After the run's last round: of all.
        """
        last = round == self._parts.recipe.rounds - 1
        if last:
            self.submit(round + 1)
        metrics: Metrics = {}
        for pending in [each for each in self._pending if last or each.round <= round]:
            metrics = self._judge(pending, round)
            self._pending.remove(pending)
        return metrics

    def _judge(self, pending: _PendingVersion, round: int) -> Metrics:
        variants = self._images(pending)
        current = variants["current"]
        rows = [row for row in range(len(current.seeds)) if row not in current.without_image]
        summary = image_summary(current.pixels[rows], [self._chosen.prompts[row].text for row in rows])
        base = self._verdicts[0] if self._verdicts else None
        verdict, figures = figures_of(self._parts.recipe, pending.version, variants, summary, base)
        self._verdicts.append(verdict)
        for alarm in verdict.alarms:
            print(f"guard: version {verdict.policy_version}: {alarm.says}", file=sys.stderr, flush=True)
        self._best.consider(self._judged(), pending.version.current)
        figures |= {"set": self._identity, "best_version": self._best.policy_version}
        self._log.write(figures, variants, self._table.saved_images)
        shown = variants["current"]
        before = self._log.images(0)
        self._trackers.show(evaluation_media(round, shown, before, self._verdicts[0].look.scores["reward"]))
        return as_metrics(figures)

    def _images(self, pending: _PendingVersion) -> dict[str, EvaluatedImages]:
        while True:
            found = {variant: self._collected(tasks) for variant, tasks in pending.tasks.items()}
            complete = {variant: images for variant, images in found.items() if images is not None}
            if len(complete) == len(found):
                return complete
            self._ask(pending)  # images went with their node before they were looked at

    def _collected(self, tasks: list[Task]) -> EvaluatedImages | None:
        places = range(tasks[0].index, tasks[-1].index + 1)
        rollouts = self._stream.collect(tasks[0].round, places, Stream.EVALUATION)
        images = [self._stream.images(rollout) for rollout in rollouts]
        pixels = [batch.pixels for batch in images if batch is not None]
        if len(pixels) < len(rollouts):
            return None
        scores = {
            name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]).astype(np.float64)
            for name in rollouts[0].scores.rewards
        }
        weights = self._parts.aggregation.weights
        scores["reward"] = np.sum([weight * scores[name] for name, weight in weights.items()], axis=0)
        reports = [rollout.report for rollout in rollouts]
        missing = [row in report.dropped for report in reports for row in range(len(report.task.seeds))]
        without_image = frozenset(row for row, is_missing in enumerate(missing) if is_missing)
        return EvaluatedImages(self._chosen.prompts, self._chosen.seeds, scores, np.concatenate(pixels), without_image)
