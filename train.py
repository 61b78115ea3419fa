"""The driver: build the parts from a recipe, and let the data go round."""

import time

from common.config import Recipe
from common.round_metrics import RoundClock, round_metrics
from common.run_folder import Lease, RunFolder
from common.schedule import last_startable_round, round_tasks
from common.trackers.fan_out import FanOut
from common.trackers.tracker import RunInfo
from deploy.composition import Parts, parts_of
from deploy.workers import Workers, ray_workers, serial_workers
from learner.checkpoint import Checkpoint, save_checkpoint
from learner.resume import resume_point
from learner.round_buffer import RoundBuffer


def train(recipe: Recipe, resume: bool = False, serial: bool = False) -> dict[str, float]:
    """Run a recipe; the last round's metrics. ValueError: what the user has to change, before anything is lost."""
    parts, folder = parts_of(recipe), RunFolder(recipe.run_path())
    checkpoint = resume_point(folder, parts.resolved(), resume)
    folder.create()
    with Lease(folder):
        trackers = FanOut(list(parts.trackers.values()))
        workers = serial_workers(parts) if serial else ray_workers(parts)
        try:
            folder.write_recipe(parts.resolved())
            first_round = checkpoint.rounds_done if checkpoint else 0
            trackers.start(RunInfo(recipe.name, folder.path, parts.resolved(), recipe.rounds, first_round))
            metrics = run_rounds(parts, workers, folder, trackers, checkpoint)
            workers.learner.save_policy(str(folder.path.absolute()))
        finally:
            trackers.finish()
            workers.close()
    return metrics


def run_rounds(
    parts: Parts, workers: Workers, folder: RunFolder, trackers: FanOut, checkpoint: Checkpoint | None
) -> dict[str, float]:
    """Data goes one way round: prompts → sampler → reward → advantages → learner → weights → sampler."""
    recipe, draw, metrics = parts.recipe, parts.prompts.load(), {}
    buffer = RoundBuffer(parts.algorithm, parts.reward_weights)
    if checkpoint:
        workers.learner.load_state(checkpoint.learner)
        buffer.statistics = checkpoint.statistics
    for weights in workers.learner.weights():
        workers.stream.publish(weights.policy_version, weights)
    first_round = submitted = checkpoint.rounds_done if checkpoint else 0
    for round in range(first_round, recipe.rounds):
        started = time.monotonic()
        while submitted <= min(last_startable_round(round, recipe.max_policy_lag), recipe.rounds - 1):
            workers.stream.submit(round_tasks(recipe, submitted, draw))  # prompts → sampler
            submitted += 1
        rollouts = workers.stream.collect(round)  # sampler → reward → scores and references
        collected = time.monotonic()
        batch, reward_metrics = buffer.train_batch(rollouts)  # scores → advantages
        update = workers.learner.start_update(batch, rollouts)  # trajectories → learner
        workers.stream.work_until(update.pending)  # the next round is drawn meanwhile, as far as the lag allows
        learned = workers.learner.metrics(update)
        workers.stream.publish(round + 1, update.weights)  # weights → sampler
        clock = RoundClock(started, collected, time.monotonic(), recipe.samplers.count)
        metrics = round_metrics(round, rollouts, {**reward_metrics, **learned}, clock)
        trackers.log(metrics)
        if (round + 1) % recipe.checkpoint.every == 0 or round + 1 == recipe.rounds:
            state = Checkpoint(round + 1, workers.learner.state(), buffer.statistics)
            save_checkpoint(folder.checkpoints, state, recipe.checkpoint.keep)
        del rollouts, update  # or the store would hold this round's trajectories while the next is collected
    return metrics
