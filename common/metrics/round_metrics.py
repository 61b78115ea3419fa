"""One round's metrics under their one name, from what the sampler, the reward worker and the learner reported."""

import math
from dataclasses import dataclass

import numpy as np
import psutil
from jaxtyping import Float

from ray_ddpo.common.metrics.named_rows import rows_by_name
from ray_ddpo.common.trajectory import Rollout, TrainBatch

MOST_PROMPTS = (
    1000  # of a round, that have a metric each: trackers keep every name, and the driver the last rounds' metrics
)


@dataclass(frozen=True)
class StreamReport:
    """What samplers and reward workers did since the last report; counts are of that time, gauges of now."""

    samplers_alive: int
    samplers_desired: int
    reward_workers_alive: int
    sampler_seconds: float  # that loaded samplers were there, summed over them
    reward_worker_seconds: float
    tasks_inflight: int
    tasks_ready: int
    retries: dict[str, int]  # by reason
    restarts: dict[str, int]  # of actors, by role
    evaluation_seconds: float = 0.0  # of sampling what is only looked at, summed over tasks


@dataclass(frozen=True)
class RoundClock:
    """When a round began and was learned from, in seconds of the driver's clock."""

    started: float  # the round before was done
    collected: float  # all of its rollouts were there
    learned: float


@dataclass(frozen=True)
class Memory:
    """Bytes that are held or sent."""

    driver_rss: int  # of the driver's process, resident
    weights: int  # of the version that the round's update published


def memory_now(weights: int) -> Memory:
    """The memory of this process, which is the driver's, beside the weights that it sends."""
    return Memory(psutil.Process().memory_info().rss, weights)


def round_metrics(
    round: int,
    rollouts: list[Rollout],
    learned: dict[str, float],
    clock: RoundClock,
    stream: StreamReport,
    memory: Memory,
) -> dict[str, float]:
    """Metrics of the whole round; seconds of sampling and scoring are summed over its tasks."""
    seconds = clock.learned - clock.started
    sampling = sum(rollout.report.seconds for rollout in rollouts)
    scoring = sum(rollout.scores.seconds for rollout in rollouts)
    images = sum(len(rollout.report.task.seeds) for rollout in rollouts)
    return {
        "round": float(round),
        "policy_version": float(round + 1),
        **learned,
        "lag/max": float(round - min(rollout.report.task.policy_version for rollout in rollouts)),
        "seconds/sample": sampling,
        "seconds/score": scoring,
        "seconds/wait": clock.collected - clock.started,
        "seconds/round": seconds,
        "idle/sampler": _idle(sampling + stream.evaluation_seconds, stream.sampler_seconds),
        "idle/reward_worker": _idle(scoring, stream.reward_worker_seconds),
        "idle/learner": _idle(learned["seconds/learn"], seconds),
        "images_per_second": images / seconds,
        **_stream_metrics(stream),
        **_memory_metrics(memory),
    }


def reward_metrics(
    batch: TrainBatch,
    rollouts: list[Rollout],
    weights: dict[str, float],
    floors: dict[str, float] | None = None,
    images_per_prompt: int = 1,
) -> dict[str, float]:
    """What the images of a whole round were worth, without those dropped; `weights` and `floors` by the reward's name."""
    prompts = [prompt.text for rollout in rollouts for prompt in rollout.report.task.prompts]
    kept = np.setdiff1d(np.arange(len(prompts)), batch.dropped)
    parts = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts])[kept] for name in weights}
    rewards = sum((weight * parts[name] for name, weight in weights.items()), np.zeros(len(kept)))
    metrics = {
        "images": float(len(prompts)),
        "images_dropped": float(len(batch.dropped)),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_std_groups": _share_without_spread(rewards, images_per_prompt),
        "advantage/std": float(batch.advantages[kept].std()),
    }
    for name, values in parts.items():
        metrics |= {f"reward/{name}/mean": float(values.mean()), f"reward/{name}/std": float(values.std())}
    for name, floor in (floors or {}).items():
        metrics[f"reward/{name}/below_floor"] = float((parts[name] < floor).mean())
    of_prompts = rows_by_name([prompts[image] for image in kept])
    if len(of_prompts) > MOST_PROMPTS:
        return metrics
    return metrics | {f"reward/prompt/{text}": float(rewards[of_prompts[text]].mean()) for text in sorted(of_prompts)}


def _share_without_spread(rewards: Float[np.ndarray, "N"], images_per_prompt: int) -> float:
    """Return the share of groups whose images all have the same reward. Without groups the round is one."""
    groups = rewards.reshape(-1, images_per_prompt if images_per_prompt > 1 else len(rewards))
    return float((groups == groups[:, :1]).all(axis=1).mean())


def _idle(busy: float, there: float) -> float:
    """The share of the time that somebody was there and did nothing; no number where nobody was there."""
    # A round's tasks may have been sampled before it began, while the round before was learned from.
    return max(0.0, 1 - busy / there) if there else math.nan


def _stream_metrics(stream: StreamReport) -> dict[str, float]:
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


def _memory_metrics(memory: Memory) -> dict[str, float]:
    return {"driver/rss_bytes": float(memory.driver_rss), "weight_bytes": float(memory.weights)}
