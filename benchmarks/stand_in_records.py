"""Answers of stand-in actors: the fields of the real records, without torch, which each process would import."""

from dataclasses import dataclass, field

import numpy as np

from ray_ddpo.common.schedule import Task


@dataclass(frozen=True)
class Sampled:
    """A TaskReport of a stand-in. A test compares its fields with the real ones."""

    task: Task
    fingerprint: str
    num_loaded_params: int
    trajectory_bytes: int
    seconds: float
    image_fingerprints: tuple[str, ...] = ()
    sampled_by: str = ""
    machine: None = None
    dropped: dict[int, str] = field(default_factory=dict)
    path_kl: tuple[float, ...] = ()
    thumbnails: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Scores of a stand-in. A test compares its fields with the real ones."""

    rewards: dict[str, np.ndarray]
    seconds: float
    dropped: dict[int, str] = field(default_factory=dict)
    machines: frozenset[object] = frozenset()
    usage: dict[str, float] = field(default_factory=dict)
