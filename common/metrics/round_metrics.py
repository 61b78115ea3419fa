"""One round's metrics, from the reports of samplers, reward workers and learner."""

import math
from dataclasses import dataclass

import numpy as np
import psutil

from ray_ddpo.common.group_spread import Refill
from ray_ddpo.common.metrics.group_statistics import RewardRange, group_metrics
from ray_ddpo.common.metrics.statistics import rows_by_name
from ray_ddpo.common.policy_versions import lag_of, version_after
from ray_ddpo.common.trajectory import Rollout, TrainBatch, path_kls, summed_usage

MOST_PROMPTS = 1000  # with one metric each per round; trackers keep every name, the driver the last rounds' metrics


@dataclass(frozen=True)
class StreamReport:
    """State and counts of samplers and reward workers. Counts are since the last report, gauges are current."""

    samplers_alive: int
    samplers_desired: int
    reward_workers_alive: int
    sampler_seconds: float  # available time, summed over loaded samplers
    reward_worker_seconds: float
    tasks_inflight: int
    tasks_ready: int
    retries: dict[str, int]  # by reason
    restarts: dict[str, int]  # of actors, by role
    evaluation_seconds: float = 0.0  # of sampling for evaluation, summed over tasks


@dataclass(frozen=True)
class RoundClock:
    """A round's timestamps in seconds of the driver's clock."""

    started: float  # the previous round ended
    collected: float  # all rollouts had arrived
    learned: float  # the update was done


@dataclass(frozen=True)
class Memory:
    """Bytes held or sent by the driver."""

    driver_rss: int  # the driver process's resident memory
    weights: int  # the published version's size


def memory_now(weights: int) -> Memory:
    """Return the current memory of this process, which is the driver's, and the size of the weights that it sends."""
    return Memory(psutil.Process().memory_info().rss, weights)


def round_metrics(
    round_index: int,
    rollouts: list[Rollout],
    learned: dict[str, float],
    clock: RoundClock,
    stream: StreamReport,
    memory: Memory,
) -> dict[str, float]:
    """Return the metrics of a full round. Seconds of sampling and scoring are summed over its tasks."""
    seconds = clock.learned - clock.started
    sampling = sum(rollout.report.seconds for rollout in rollouts)
    scoring = sum(rollout.scores.seconds for rollout in rollouts)
    images = sum(len(rollout.report.task.seeds) for rollout in rollouts)
    return {
        "round": float(round_index),
        "policy_version": float(version_after(round_index)),
        **learned,
        "lag/max": float(max(lag_of(round_index, rollout.report.task.policy_version) for rollout in rollouts)),
        "seconds/sample": sampling,
        "seconds/score": scoring,
        "seconds/wait": clock.collected - clock.started,
        "seconds/round": seconds,
        "idle/sampler": _idle(sampling + stream.evaluation_seconds, stream.sampler_seconds),
        "idle/reward_worker": _idle(scoring, stream.reward_worker_seconds),
        "idle/learner": _idle(learned["seconds/learn"], seconds),
        "images_per_second": images / seconds,
        **_stream_metrics(stream),
        "driver/rss_bytes": float(memory.driver_rss),
        "weight_bytes": float(memory.weights),
    }


def reward_metrics(
    batch: TrainBatch,
    rollouts: list[Rollout],
    weights: dict[str, float],
    floors: dict[str, float] | None = None,
    images_per_prompt: int = 1,
    possible: RewardRange | None = None,
) -> dict[str, float]:
    """Return statistics of a full round's rewards and advantages, without dropped images.

    Weights and floors are those of each reward, by name. `possible` is the range of their weighted sum.
    """
    prompts = [prompt.key for rollout in rollouts for prompt in rollout.report.task.prompts]
    kept = np.setdiff1d(np.arange(len(prompts)), batch.dropped)
    parts = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts])[kept] for name in weights}
    rewards = sum((weight * parts[name] for name, weight in weights.items()), np.zeros(len(kept)))
    metrics = {
        "images": float(len(prompts)),
        "images_dropped": float(len(batch.dropped)),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **group_metrics(rewards, images_per_prompt, possible),
        "advantage/std": float(batch.advantages[kept].std()),
    }
    for name, values in parts.items():
        metrics |= {f"reward/{name}/mean": float(values.mean()), f"reward/{name}/std": float(values.std())}
    usage = summed_usage([rollout.scores.usage for rollout in rollouts])
    metrics |= {f"reward/{name}": value for name, value in usage.items()}
    if len(path_kl := path_kls(rollouts)):
        metrics["reward/path_kl_nats"] = float(path_kl[kept].mean())
    for name, floor in (floors or {}).items():
        metrics[f"reward/{name}/below_floor"] = float((parts[name] < floor).mean())
    by_prompt = rows_by_name([prompts[image] for image in kept])
    if len(by_prompt) > MOST_PROMPTS:
        return metrics
    return metrics | {f"reward/prompt/{text}": float(rewards[by_prompt[text]].mean()) for text in sorted(by_prompt)}


def refill_metrics(refill: Refill, rollouts: list[Rollout]) -> dict[str, float]:
    """Return how many further groups a round was refilled with, and how many it still lacks."""
    with_spread = refill.with_spread(rollouts)
    return {
        "refill/groups": float(len(with_spread) - refill.groups),
        "refill/lacking": float(max(0, refill.groups - int(with_spread.sum()))),
    }


def _idle(busy: float, available: float) -> float:
    """Return the idle share of the available time; NaN if no worker was available."""
    # A round's tasks may have been sampled during the previous round's update, so the difference may be negative.
    return max(0.0, 1 - busy / available) if available else math.nan


def _stream_metrics(stream: StreamReport) -> dict[str, float]:
    """Return the stream's metrics under their names."""
    metrics = {
        "samplers/alive": stream.samplers_alive,
        "samplers/desired": stream.samplers_desired,
        "reward_workers/alive": stream.reward_workers_alive,
        "tasks/inflight": stream.tasks_inflight,
        "tasks/ready": stream.tasks_ready,
    }
    metrics |= {f"retries/{reason}": count for reason, count in stream.retries.items()}
    metrics |= {f"actor_restarts/{role}": count for role, count in stream.restarts.items()}
    return {name: float(value) for name, value in metrics.items()}
