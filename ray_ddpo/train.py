"""The driver: build the components of a recipe, and let the data go round."""

import time

from ray_ddpo.actors.rollouts.inquiry import RewardFailed
from ray_ddpo.actors.rollouts.ray_stream import StallError
from ray_ddpo.common.metrics.round_metrics import RoundClock
from ray_ddpo.common.policy_versions import last_startable_round
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.lease import Lease
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import round_parts, round_tasks
from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trackers.tracker import RunInfo
from ray_ddpo.common.trajectory import Scored
from ray_ddpo.deploy.driver.components import NOTHING_GIVEN, Components, Given, build_components
from ray_ddpo.deploy.driver.progress import RunProgress
from ray_ddpo.deploy.driver.replay_buffer import ReplayBuffer
from ray_ddpo.deploy.driver.resampling import collected_rollouts, sampled_again
from ray_ddpo.deploy.driver.start import start_of
from ray_ddpo.deploy.driver.supervision import Stopped, Supervision
from ray_ddpo.deploy.driver.workers import Workers, ray_workers, serial_workers
from ray_ddpo.deploy.evaluation.eval_runner import EvalRunner
from ray_ddpo.deploy.hub import check_push
from ray_ddpo.learner.learner_group import Learned, TrajectoriesLost
from ray_ddpo.learner.optimization.optimizer_steps import NotFinite
from ray_ddpo.learner.restart_check import RestartDiffers


def run_training(
    recipe: Recipe, resume: bool = False, serial: bool = False, given: Given = NOTHING_GIVEN
) -> dict[str, float]:
    """Run a recipe and return the last round's metrics.

    Raises:
        ValueError: something that the user has to change, before anything is lost.
        Stopped: a signal came, or storage or cluster failed. The last checkpoint has what was learned.
        One of FATAL_ERRORS: the run cannot continue.
    """
    components, folder = build_components(recipe, given), RunFolder(recipe.run_path())
    folder.create()
    with Lease(folder) as lease, Supervision(folder, recipe, lease) as supervision:
        start = start_of(folder, components, resume)
        components, checkpoint = start.components, start.checkpoint
        check_push(recipe)
        trackers = FanOut(components.trackers)
        workers = (serial_workers if serial else ray_workers)(components, supervision, start.base)
        try:
            with folder.token() as token:
                workers.learner.check_folder(folder.location, token)
            start.write(folder)
            evaluating = EvalRunner(components, folder, workers, trackers)
            progress = RunProgress(components, trackers, evaluating, folder, checkpoint, start.base.parts)
            ids = checkpoint.tracker_ids if checkpoint else {}
            run = RunInfo(recipe.name, folder.location, components.resolved(), recipe.rounds, progress.rounds_done, ids)
            trackers.start(run)
            pretrained = workers.learner.weights()[-1]
            if checkpoint:
                workers.learner.load_state(checkpoint.learner)
            evaluating.begin(pretrained, checkpoint)
            progress.begin(workers.learner.machine(), checkpoint.learner.machine if checkpoint else None)
            del start, checkpoint, pretrained  # or the driver's heap would hold the loaded state until the run's end
            supervision.saved = lambda: progress.last_checkpoint
            run_rounds(components, workers, progress, supervision)
            workers.learner.save_policy(folder.location)
            evaluating.end()
        except StallError as stuck:
            folder.write_watchdog(f"{stuck}\n--- learner\n{workers.learner.stacks()}\n")
            raise
        finally:
            trackers.finish()
            workers.close()
    print(progress.closing_line(serial))
    return progress.metrics[-1] if progress.metrics else {}


def run_rounds(components: Components, workers: Workers, progress: RunProgress, supervision: Supervision) -> None:
    """Data goes one way round: prompts → sampler → reward → advantages → learner → weights → sampler."""
    recipe, sample, submitted = components.recipe, components.prompts.load(), progress.rounds_done
    try:
        replay = ReplayBuffer(components, workers, progress.buffer, sample).restore(submitted)
        for round_index in range(progress.rounds_done, recipe.rounds):
            if progress.evaluating.is_over:  # the guard ended the run
                break
            started = time.monotonic()
            while submitted <= min(last_startable_round(round_index, recipe.max_policy_lag), recipe.rounds - 1):
                workers.submit(round_tasks(recipe, submitted, sample))  # prompts and weights → sampler
                submitted += 1
            progress.evaluating.submit(round_index)  # held-out prompts → sampler, behind them
            scored: list[Scored] = []
            for tasks in round_parts(recipe):  # one, unless the learner is to begin with a round's first tasks
                # sampler → reward → scores and references
                rollouts = collected_rollouts(components, workers, round_index, tasks, sample)
                scored.append((progress.buffer.train_batch(rollouts), rollouts))  # scores → advantages
                if len(scored) < recipe.learner.parts_per_round:
                    workers.learner.begin(*scored[-1])
            collected = time.monotonic()
            learned, state = learn(workers, replay.joined(scored))  # trajectories → learner
            replay.add(scored)
            progress.learned(state, learned)
            progress.write(scored, learned, RoundClock(started, collected, time.monotonic()), workers)
            supervision.check()
            del rollouts, scored  # or the store would hold this round's trajectories while the next is collected
    except (NotFinite, RestartDiffers, RewardFailed, Stopped) as ended:
        if not isinstance(ended, Stopped) or ended.may_commit:
            progress.commit()
        if isinstance(ended, NotFinite):
            progress.save_good(workers)
        raise


def learn(workers: Workers, scored: list[Scored]) -> Learned:
    """Learn from a round while others are sampled; trajectories that were lost with their node are re-sampled first."""
    while True:
        try:
            return workers.learner.update(*scored[-1])
        except TrajectoriesLost:
            scored = sampled_again(workers, scored)
            for part in scored[:-1]:
                workers.learner.begin(*part)
