"""EvalRunner: evaluate policy versions on held-out images beside the training, judge them, and keep the best weights.

The schedule decides which version is evaluated and in which round its scores are read; timing does not. The guard
therefore decides alike for any number of samplers and after any resume.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.actors.evaluation.image_summary import image_summary
from ray_ddpo.actors.rollouts.stream import RolloutStream
from ray_ddpo.common.clips import ImageOrClip, is_clip
from ray_ddpo.common.policy_versions import evaluation_round
from ray_ddpo.common.policy_weights import PolicyWeights, averaged
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.tables import GuardTable
from ray_ddpo.common.run_storage.run_folder import BEST, GUARD, WEIGHTS, RunFolder
from ray_ddpo.common.schedule import Stream, Task
from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trackers.media import CaptionedImage, Media, ShownTable
from ray_ddpo.common.trajectory import summed_usage
from ray_ddpo.common.video_files import playable
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.workers import Workers
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import (
    WEIGHTED_SUM,
    EvalResult,
    eval_identity,
    eval_metrics,
    judge,
    judged_from_log,
    with_weighted_sum,
)
from ray_ddpo.deploy.evaluation.guard import JudgedVersion, best_version, is_over
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint
from ray_ddpo.learner.checkpoints.learner_state import EvaluationState, EvalVersion
from ray_ddpo.learner.learner_group import LearnerGroup

Metrics = dict[str, float]
PANEL = "evaluation"  # of the trackers


@dataclass(frozen=True)
class _PendingVersion:
    """A version whose images are being sampled."""

    version: EvalVersion
    round_index: int  # its tasks come after this round's training tasks, and are read after this round's update
    variants: dict[str, tuple[PolicyWeights, list[Task]]]  # "current", and "average" if there is a moving average


class EvalRunner:
    """The driver's side of `[evaluation]` and `[guard]`. It does nothing if `evaluation.every` is 0."""

    def __init__(self, components: Components, folder: RunFolder, workers: Workers, trackers: FanOut) -> None:
        self._components = components
        self._table = components.recipe.evaluation
        self._stream: RolloutStream = workers.stream
        self._learner = workers.learner
        self._eval_set = build_eval_set(self._table, components.prompts)
        self._identity = eval_identity(components.recipe, self._eval_set)
        self._folder = folder
        self._trackers = trackers
        self._log = EvalLog(folder.storage, folder.unwritten)
        self._best = BestWeights(folder, workers.learner, components.recipe.guard)
        self._pending: list[_PendingVersion] = []
        self._waiting: list[EvalVersion] = []  # due, not submitted yet
        self._average: PolicyWeights | None = None
        self._judged: list[JudgedVersion] = []

    def begin(self, pretrained: PolicyWeights, checkpoint: Checkpoint | None) -> None:
        """Restore earlier evaluations before the first round of this start, and find the versions that are still due.

        Args:
            pretrained: the weights before any training, which are version 0.
            checkpoint: the checkpoint to resume from, if any.
        """
        if not self._table.every:
            return
        if self._eval_set.suite:
            print_line(f"evaluation: {self._eval_set.in_words}")
        rounds_done = checkpoint.rounds_done if checkpoint else 0
        state = checkpoint.evaluation if checkpoint else EvaluationState()
        known = [each for each in self._log.entries() if each["policy_version"] <= rounds_done]
        if any(each["set"] != self._identity for each in known):
            print_line("evaluation: images or scorers differ from before: evaluations start again")
            known = []
        self._log.keep(known)
        self._judged = [judged_from_log(each, self._log.scores(each["policy_version"])) for each in known]
        newest = self._learner.weights()[-1]
        self._average = (state.average or newest) if self._table.ema_decay else None
        done = {judged.policy_version for judged in self._judged}
        due = {} if 0 in done else {0: EvalVersion(pretrained)}
        # The recipe may ask for evaluations since this start only: then the checkpoint does not list this version.
        if self._table.is_due(rounds_done, self._components.recipe.rounds):
            due[rounds_done] = EvalVersion(newest, self._average)
        due |= {each.policy_version: each for each in state.pending}
        self._waiting = [due[version] for version in sorted(due.keys() - done)]

    def learned(self, published: PolicyWeights, kl_reference_nats: float | None) -> None:
        """Take note of a newly published version: update the moving average, and evaluate the version if it is due."""
        if self._average is not None and self._table.ema_decay is not None:
            self._average = averaged(self._average, published, self._table.ema_decay)
        if self._table.is_due(published.policy_version, self._components.recipe.rounds):
            self._waiting.append(EvalVersion(published, self._average, kl_reference_nats))

    @property
    def state(self) -> EvaluationState:
        """Return the versions that are still to be evaluated, and the moving average, for the checkpoint."""
        pending = [each.version for each in self._pending] + self._waiting
        return EvaluationState(self._average, tuple(pending))

    @property
    def is_over(self) -> bool:
        """Return whether the guard ends the run now."""
        return is_over(self._judged, self._components.recipe.guard)

    def submit(self, rounds_done: int) -> None:
        """Submit the versions that are due to the samplers, behind the rounds in flight."""
        lag = self._components.recipe.max_policy_lag
        for version in self._waiting:
            round_index = evaluation_round(version.policy_version, lag, rounds_done)
            earlier = [each for each in self._pending if each.round_index == round_index]
            first = sum(len(each.variants) for each in earlier) * self._eval_set.num_tasks
            variants = {}
            for variant, weights in {"current": version.current, "average": version.average}.items():
                if weights is not None:
                    sampling = self._components.recipe.held_out_sampling
                    tasks = self._eval_set.tasks(version.policy_version, round_index, first, sampling)
                    variants[variant] = (weights, tasks)
                    first += self._eval_set.num_tasks
            self._pending.append(_PendingVersion(version, round_index, variants))
            self._submit_tasks(self._pending[-1])
        self._waiting = []

    def end(self) -> None:
        """Finish after the run's last round.

        If the guard ended the run, say so, and roll back if the recipe wants that.
        """
        if not self.is_over:
            self._folder.storage.remove(GUARD)
            return
        alarms = [alarm.says for alarm in self._judged[-1].alarms]
        ended = {"policy_version": self._judged[-1].policy_version, "alarms": alarms, "weights_of": None}
        says = f"guard: the run ends here, as guard.on_alarm = {self._components.recipe.guard.on_alarm!r} asks"
        if self._components.recipe.guard.on_alarm == "roll_back":
            ended["weights_of"] = self._best.roll_back()
            says += f"; its weights are those of version {ended['weights_of']}"
        self._folder.storage.write(GUARD, json.dumps(ended, indent=1).encode())
        print_line(says)

    def _submit_tasks(self, pending: _PendingVersion) -> None:
        for weights, tasks in pending.variants.values():
            self._stream.submit(tasks, weights)

    def read(self, round_index: int) -> Metrics:
        """Wait for the evaluations that are to be read after this round, and judge them. The last round reads all.

        Returns:
            The metrics of the last version read; empty if there was none.
        """
        last = round_index == self._components.recipe.rounds - 1
        if last:
            self.submit(round_index + 1)
        metrics: Metrics = {}
        for pending in [each for each in self._pending if last or each.round_index <= round_index]:
            metrics = self._judge(pending, round_index)
            self._pending.remove(pending)
        return metrics

    def _judge(self, pending: _PendingVersion, round_index: int) -> Metrics:
        """Collect a version's images, judge, log and show them; return their metrics."""
        variants = self._collected(pending)
        current = variants["current"]
        rows = [row for row in range(len(current.seeds)) if row not in current.without_image]
        summary = image_summary(current.pixels[rows], [self._eval_set.prompts[row].key for row in rows])
        base = self._judged[0] if self._judged else None
        judged, entry = judge(
            self._components.recipe, pending.version, variants, summary, base, self._components.reward_range
        )
        self._judged.append(judged)
        for alarm in judged.alarms:
            print_line(f"guard: version {judged.policy_version}: {alarm.says}")
        self._best.consider(self._judged, pending.version.current)
        entry |= {"set": self._identity, "best_version": self._best.policy_version}
        self._log.write(entry, variants, self._table.saved_images)
        reward_before = self._judged[0].stats.scores[WEIGHTED_SUM]
        before = self._log.clips(0) or self._log.images(0)
        self._trackers.show(eval_media(round_index, current, before, reward_before))
        usage = summed_usage([result.usage for result in variants.values()])
        return eval_metrics(entry) | {f"evaluation/{name}": value for name, value in usage.items()}

    def _collected(self, pending: _PendingVersion) -> dict[str, EvalResult]:
        """Return a version's results by variant. Images that were lost with their node are sampled again."""
        while True:
            found = {variant: self._result(tasks) for variant, (_, tasks) in pending.variants.items()}
            complete = {variant: result for variant, result in found.items() if result is not None}
            if len(complete) == len(found):
                return complete
            self._submit_tasks(pending)

    def _result(self, tasks: list[Task]) -> EvalResult | None:
        """Wait for the tasks of one variant; None if images were lost with their node."""
        indices = range(tasks[0].index, tasks[-1].index + 1)
        rollouts = self._stream.collect(tasks[0].round, indices, Stream.EVALUATION)
        found = [self._stream.images(rollout) for rollout in rollouts]
        batches = [batch for batch in found if batch is not None]
        if len(batches) < len(rollouts):
            return None
        scores = {
            name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]).astype(np.float64)
            for name in rollouts[0].scores.rewards
        }
        scores = with_weighted_sum(scores, self._components.aggregation.weights)
        reports = [rollout.report for rollout in rollouts]
        missing = [row in report.dropped for report in reports for row in range(len(report.task.seeds))]
        without_image = frozenset(row for row, is_missing in enumerate(missing) if is_missing)
        usage = summed_usage([rollout.scores.usage for rollout in rollouts])
        of_all, rate = np.concatenate([batch.pixels for batch in batches]), batches[0].frame_rate
        return EvalResult(self._eval_set.prompts, self._eval_set.seeds, scores, of_all, without_image, usage, rate)


class BestWeights:
    """The best version's weights so far, in `best/` of the run's folder, in the layout of the run's own weights.

    Commands that take a run's folder therefore take `best/` too.
    """

    def __init__(self, folder: RunFolder, learner: LearnerGroup, settings: GuardTable) -> None:
        self._folder = folder
        self._learner = learner
        self._settings = settings
        self.policy_version: int | None = None

    def consider(self, judged: list[JudgedVersion], weights: PolicyWeights) -> None:
        """Save the weights of the last judged version if this version is the best now."""
        self.policy_version = best_version(judged, self._settings.best_by)
        newest = judged[-1]
        if self.policy_version != newest.policy_version:
            return
        about = {
            "policy_version": newest.policy_version,
            "fingerprint": weights.fingerprint,
            "best_by": self._settings.best_by,
            "score": newest.score(self._settings.best_by),
        }
        self._folder.unwritten.call(lambda: self._write(weights, json.dumps(about, indent=1).encode()))

    def _write(self, weights: PolicyWeights, about: bytes) -> None:
        self._learner.save_policy(self._folder.best.location, weights)
        self._folder.best.write(BEST, about)

    def roll_back(self) -> int | None:
        """Replace the run's weights by the best ones; return their version, or None if every version had an alarm."""
        about = self._folder.best_version()
        best = self._folder.best
        for name in [name for name in WEIGHTS if best.exists(name)]:
            self._folder.storage.remove(name)
            for file in best.names(name):
                self._folder.storage.write(f"{name}/{file}", best.read(f"{name}/{file}"))
        return about["policy_version"] if about else None


def eval_media(
    round_index: int,
    result: EvalResult,
    before: Sequence[ImageOrClip],
    reward_before: Float[np.ndarray, "N"],
) -> Media:
    """Show a version's first images, or clips, beside the pretrained model's of the same noise.

    Args:
        round_index: the round to show them at.
        result: the version's images and scores.
        before: the pretrained model's first images, or its clips as in a file; as many are shown.
        reward_before: the pretrained model's weighted rewards.
    """
    pairs, rows = [], []
    for image, earlier in enumerate(before):
        now, prompt, reward = result.pixels[image], result.prompts[image].text, result.scores[WEIGHTED_SUM][image]
        now, rate = playable(now) if is_clip(now) else now, result.frame_rate
        caption = f"{prompt}: reward {reward:.4g} ({reward - reward_before[image]:+.3g})"
        pairs.append(CaptionedImage(np.concatenate([earlier, now], axis=-2), caption, rate))
        scored = [float(values[image]) for values in result.scores.values()]
        # Seeds as text, because numbers of a web page are exact to 53 bits only.
        cells = (CaptionedImage(each, frame_rate=rate) for each in (earlier, now))
        rows.append((prompt, str(result.seeds[image]), *cells, *scored))
    columns = ("prompt", "seed", "before", "now", *result.scores)
    scores = {f"{PANEL}/{name}": values[np.isfinite(values)] for name, values in result.scores.items()}
    if not pairs:
        return Media(round_index, histograms=scores)
    return Media(round_index, {PANEL: tuple(pairs)}, {PANEL: ShownTable(columns, tuple(rows))}, scores)
