"""One round's metrics under their one name, from what the sampler, the reward worker and the learner reported."""

from dataclasses import dataclass

from common.trajectory import Rollout


@dataclass(frozen=True)
class RoundClock:
    """When a round began and was learned from, in seconds of the driver's clock, and how many samplers there are."""

    started: float  # the round before was done
    collected: float  # all of its rollouts were there
    learned: float
    num_samplers: int


def round_metrics(
    round: int, rollouts: list[Rollout], learned: dict[str, float], clock: RoundClock
) -> dict[str, float]:
    """Metrics of the whole round; seconds of sampling and scoring are summed over its tasks."""
    seconds = clock.learned - clock.started
    sampling = sum(rollout.report.seconds for rollout in rollouts)
    images = sum(len(rollout.report.task.seeds) for rollout in rollouts)
    return {
        "round": float(round),
        "policy_version": float(round + 1),
        **learned,
        "lag/max": float(round - min(rollout.report.task.policy_version for rollout in rollouts)),
        "seconds/sample": sampling,
        "seconds/score": sum(rollout.scores.seconds for rollout in rollouts),
        "seconds/wait": clock.collected - clock.started,
        "seconds/round": seconds,
        "idle/sampler": max(0.0, 1 - sampling / (seconds * clock.num_samplers)),
        "idle/learner": max(0.0, 1 - learned["seconds/learn"] / seconds),
        "images_per_second": images / seconds,
    }
