"""Names of the learner's calls on the dashboard."""

from ray_ddpo.common.trajectory import TrainBatch


def title_of(batch: TrainBatch, rank: int = 0, world_size: int = 1) -> str:
    """Return a call's name on the dashboard. The class comes first, because Ray names the process alike."""
    which = f"Learner rank {rank} of {world_size}" if world_size > 1 else "Learner"
    return f"{which}: learn from round {batch.round}" + (f", part {batch.part}" if batch.parts > 1 else "")
