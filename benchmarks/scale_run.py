"""Measure one setting of the scale benchmark: the driver's real loop and files with stand-in actors."""

import dataclasses
import functools
import json
import resource
import sys
import tempfile
import time
from contextlib import redirect_stdout
from typing import Any, cast

import numpy as np
import psutil
import ray

from benchmarks.broadcast import stored_bytes
from benchmarks.scale_fit import Cost
from benchmarks.scale_stand_ins import SamplerHandle, SamplerHost, ScorerStandIn, Setting
from benchmarks.stand_in_run import CPUS_OF_A_SLEEPER, local_ray
from ray_ddpo.actors.rollouts.ray_stream import Pools, RayRolloutStream
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool
from ray_ddpo.actors.rollouts.stream import StreamSettings
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trackers.tracker import RunInfo
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.deploy.driver.progress import RunProgress
from ray_ddpo.deploy.driver.supervision import Supervision
from ray_ddpo.deploy.driver.workers import Workers
from ray_ddpo.deploy.evaluation.eval_runner import EvalRunner
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.ray_learner_group import RayLearnerGroup
from ray_ddpo.train import run_rounds

REWARD_WORKERS = 2
WARM_UP = 1  # rounds: connections are made, caches filled


class LearnerStandIn:
    """A learner, or all ranks of one, that learns nothing and publishes weights of a given size."""

    def __init__(self, setting: Setting) -> None:
        self._buffer = np.zeros(setting.weight_bytes // 4, np.float32)
        self._published = pack(0, {"stand_in": self._buffer})

    def ready(self) -> bool:
        """Return True."""
        return True

    def stacks(self) -> str:
        """Return a placeholder for the stack traces."""
        return "a stand-in"

    def join(self, rendezvous: str) -> None:
        """Join nobody."""

    def weights(self) -> tuple[PolicyWeights, ...]:
        """Return the only version that is requested at lag 0."""
        return (self._published,)

    def state(self, newest_only: bool = False) -> LearnerState:
        """Return a state without optimizer state."""
        return LearnerState(self._published.policy_version, (self._published,), {}, {})

    def lead(
        self, batch: TrainBatch, *trajectories: np.ndarray
    ) -> tuple[dict[str, float], PolicyWeights, LearnerState]:
        """Publish the next version."""
        assert len(trajectories) == len(batch.reports)
        version = self._published.policy_version + 1
        self._published = dataclasses.replace(self._published, policy_version=version)
        return {"seconds/learn": 0.0}, self._published, dataclasses.replace(self.state(), weights=())

    def follow(self, batch: TrainBatch, *trajectories: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
        """Return what a rank other than 0 returns. Its call comes after rank 0's."""
        assert len(trajectories) == len(batch.reports)
        return self._published.fingerprint, {}


class Meter:
    """A replacement for `Supervision`, which the driver calls after every round."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, float, float, float, float]] = []
        self._driver = psutil.Process()
        names = ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", "log_monitor")
        children = [(child, " ".join(child.cmdline()[:4])) for child in self._driver.children(recursive=True)]
        self._cluster = [child for child, line in children if any(name in line for name in names)]
        self._resident = self._driver.memory_info().rss
        self.check()

    def check(self) -> None:
        """Record the clocks."""
        cluster = sum(_cpu_seconds(child) for child in self._cluster if child.is_running())
        stored = float(sum(stored_bytes().values()))
        own = _cpu_seconds(self._driver)
        self.rounds.append((time.monotonic(), own, time.thread_time(), cluster, stored))

    def cost(self, setting: Setting) -> Cost:
        """Return means over the rounds after the first."""
        first, last = np.array(self.rounds[WARM_UP]), np.array(self.rounds[-1])
        seconds, cpu, python, cluster, stored = (last - first) / (len(self.rounds) - 1 - WARM_UP)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._resident
        return Cost(seconds - setting.sampling_seconds, cpu, python, cluster, peak / 1e6, stored / 1e6)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def recipe_of(setting: Setting, folder: str, rounds: int) -> Recipe:
    """Return a recipe whose rounds have the setting's sizes."""
    return Recipe.parse(
        {
            "name": "scale",
            "output_dir": folder,
            "rounds": rounds,
            "max_policy_lag": 0,
            "policy": {"name": "stable_diffusion", "model": "tiny_animals"},
            "prompts": {"name": "animals"},
            "sampling": {"batch_size": setting.images_per_task, "batches_per_round": setting.tasks},
            "reward": {"name": "jpeg_compressibility", "label": "stand_in"},
            "algorithm": {"name": "ddpo_is"},
            "learner": {"batch_size": setting.images_per_task, "micro_batch_size": 1},
            "checkpoint": {"every": rounds},
        }
    )


def measured(setting: Setting, rounds: int) -> Cost:
    """Start the stand-ins on a new cluster, run `train.run_rounds`, and stop them."""
    with tempfile.TemporaryDirectory() as folder, local_ray():
        components = build_components(recipe_of(setting, folder, WARM_UP + rounds))
        workers = _workers(components, setting)
        run_folder = RunFolder(components.recipe.run_path())
        run_folder.create()
        trackers = FanOut({name: components.trackers[name] for name in ("jsonl", "ray")})
        evaluating = EvalRunner(components, run_folder, workers, trackers)
        progress = RunProgress(components, trackers, evaluating, run_folder, None, {})
        trackers.start(RunInfo("scale", run_folder.location, components.resolved(), components.recipe.rounds, 0, {}))
        meter = Meter()
        run_rounds(components, workers, progress, cast(Supervision, meter))
        trackers.finish()
        return meter.cost(setting)


def _workers(components: Components, setting: Setting) -> Workers:
    """Start the stand-in actors and wrap them in the driver's worker pools, stream and learner group."""
    recipe, budget = components.recipe, RestartBudget(0)
    options: dict[str, Any] = {"num_cpus": CPUS_OF_A_SLEEPER, "concurrency_groups": {"health": 1}}
    host = ray.remote(**options)(SamplerHost).options(max_concurrency=100_000)
    hosts = [host.remote(setting) for _ in range(min(setting.processes, setting.samplers))]
    samplers = WorkerPool(
        "samplers", "sampler", lambda index: SamplerHandle(hosts[index % len(hosts)], index), setting.samplers, budget
    )
    scorer = ray.remote(**options)(ScorerStandIn)
    scorers = WorkerPool("reward_workers", "reward_worker", lambda index: scorer.remote(), REWARD_WORKERS, budget)
    scoring = ScoringPool(scorers, ("stand_in",), recipe.reward_workers, independent=True)
    pools = Pools(samplers, (scoring,), budget)
    stream = RayRolloutStream(pools, StreamSettings(recipe.runtime, 1e9, check=lambda: None))
    make = functools.partial(ray.remote(**options)(LearnerStandIn).remote, setting)
    on_death = lambda death: budget.spend("learner", death.reason)  # noqa: E731
    ranks = [make()] * setting.ranks
    learner = RayLearnerGroup(ranks, lambda: ranks, stream.keep_busy_until_ready, on_death, 0)
    stream.wait_until_loaded({"samplers": setting.samplers, "reward_workers": REWARD_WORKERS})
    learner.wait_until_loaded()
    return Workers(stream, learner)


def main() -> None:
    """Measure the setting given on standard input as JSON ({"setting": {…}, "rounds": N}). Print its cost as JSON."""
    asked = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        cost = measured(Setting(**asked["setting"]), asked["rounds"])
    print(json.dumps(dataclasses.asdict(cost)))


if __name__ == "__main__":
    main()
