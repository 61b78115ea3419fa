"""MFU of a round: counted operations, divided by the operations that matrix products could do in the same time."""

from collections.abc import Iterable

from ray_ddpo.common.trajectory import Rollout


def mfu_metrics(
    rollouts: Iterable[Rollout],
    left_out: int,
    work: tuple[float, float],
    learn_seconds: float,
    rank_rate: tuple[float, int],
) -> dict[str, float]:
    """Return `mfu/sampler` and `mfu/learner`, each only if its devices' rate is known.

    Args:
        rollouts: of a full round.
        left_out: images of the round that are not learned from: dropped, or of groups that a refill left out.
        work: operations of sampling one image, and of learning from one sampled image.
        learn_seconds: of the update.
        rank_rate: operations a second of matrix products on one rank, and the number of ranks.
    """
    (sampling, learning), (rate, ranks) = work, rank_rate
    possible = sampled = 0.0
    learned_from = -left_out
    for rollout in rollouts:
        report = rollout.report
        images = len(report.task.seeds)
        learned_from += images
        if report.machine is not None and report.machine.matrix_rate:
            possible += report.seconds * report.machine.matrix_rate
            sampled += images * sampling
    metrics = {"mfu/sampler": sampled / possible} if possible else {}
    if rate and learn_seconds:
        metrics["mfu/learner"] = learned_from * learning / (learn_seconds * rate * ranks)
    return metrics
