"""What the learner's calls are called on the dashboard."""

from ray_ddpo.common.trajectory import TrainBatch


def title_of(batch: TrainBatch, rank: int = 0, ranks: int = 1) -> str:
    """What is learned from, as the dashboard shows it; the class comes first because Ray makes it the process's name too."""
    which = f"Learner rank {rank} of {ranks}" if ranks > 1 else "Learner"
    return f"{which}: learn from round {batch.round}" + (f", part {batch.part}" if batch.parts > 1 else "")
