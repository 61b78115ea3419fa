"""Stand-ins for the scale benchmark. They answer at once with as many bytes as real actors."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.stand_in_records import Sampled, Scored
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.schedule import Place, Task

LATENT_CHANNELS = 4
PIXELS_A_LATENT = 8  # along each side, as in Stable Diffusion
LATENT_BYTES = 2  # float16


@dataclass(frozen=True)
class Setting:
    """The sizes of one round. A field that is not varied keeps its default."""

    images: int = 512  # a round
    images_per_task: int = 8
    steps: int = 10  # kept and learned from
    pixels: int = 128  # along each side
    samplers: int = 16
    processes: int = 4  # that the samplers share
    weight_bytes: int = 3_000_000  # rank-4 adapters of Stable Diffusion 1.5
    ranks: int = 1  # of the learner, which share a process
    busy_seconds: float = 0.0  # that every sampler samples in a round
    uneven: bool = False  # every second sampler is half as fast as the others, and together they are as fast

    @property
    def tasks(self) -> int:
        """Return the number of tasks per round."""
        return self.images // self.images_per_task

    @property
    def trajectory_bytes(self) -> int:
        """Return the bytes of an image's trajectory: the initial latents, and those after each step."""
        side = self.pixels // PIXELS_A_LATENT
        return (self.steps + 1) * LATENT_CHANNELS * side * side * LATENT_BYTES

    @property
    def image_bytes(self) -> int:
        """Return the bytes of an image's pixels."""
        return 3 * self.pixels * self.pixels

    @property
    def sampling_seconds(self) -> float:
        """Return the time of a round's sampling if no sampler is ever idle."""
        speeds = [1 / self._slowness(sampler) for sampler in range(self.samplers)]
        return self.busy_seconds * self.samplers / sum(speeds)

    def _slowness(self, sampler: int) -> float:
        return (0.75, 1.5)[sampler % 2] if self.uneven else 1.0

    def task_seconds(self, sampler: int) -> float:
        """Return the seconds that a sampler sleeps for a task."""
        return self._slowness(sampler) * self.busy_seconds * self.samplers / self.tasks


class SamplerHost:
    """A process of samplers. Each works on one task at a time, in the order of the calls."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._hands: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._forgotten: set[Place] = set()

    async def ready(self) -> bool:
        """Return True."""
        return True

    async def stacks(self) -> str:
        """Return a placeholder for the stack traces."""
        return "a stand-in"

    async def forget(self, place: Place) -> None:
        """Skip this task when its turn comes, as a sampler does."""
        self._forgotten.add(place)

    async def sample(
        self, sampler: int, task: Task, weights: PolicyWeights, care: object = None, note: object = None
    ) -> tuple[Sampled, np.ndarray, np.ndarray] | tuple[None, None, None]:
        """Return a trajectory and images of the right size."""
        async with self._hands[sampler]:
            if task.place in self._forgotten:
                self._forgotten.remove(task.place)
                return None, None, None
            count, seconds = len(task.seeds), self._setting.task_seconds(sampler)
            if seconds:
                await asyncio.sleep(seconds)
            trajectory = np.zeros(count * self._setting.trajectory_bytes, np.uint8)
            images = np.zeros((count, self._setting.image_bytes), np.uint8)
            fingerprints = tuple(f"{seed:064x}" for seed in task.seeds)
            sampled_by = f"stand-in {sampler}"
            report = Sampled(task, weights.fingerprint, 1, trajectory.nbytes, seconds, fingerprints, sampled_by)
            return report, trajectory, images


class SamplerHandle:
    """A sampler of a host with the interface of a separate actor."""

    def __init__(self, host: Any, sampler: int) -> None:
        self.ready, self.stacks, self.forget = host.ready, host.stacks, host.forget
        self.sample = _Numbered(host.sample, sampler)


class _Numbered:
    """A method of the host whose first argument is the sampler's number."""

    def __init__(self, method: Any, sampler: int) -> None:
        self._method = method
        self._sampler = sampler

    def options(self, **options: Any) -> "_Numbered":
        return _Numbered(self._method.options(**options), self._sampler)

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._sampler, *arguments)


class ScorerStandIn:
    """A reward worker whose scores are a fixed ramp, so that rewards differ."""

    def ready(self) -> bool:
        """Return True."""
        return True

    def stacks(self) -> str:
        """Return a placeholder for the stack traces."""
        return "a stand-in"

    def score(self, images: np.ndarray, first: int = 0, last: int | None = None, note: object = None) -> Scored:
        """Return one number per image."""
        return Scored({"stand_in": np.arange(len(images), dtype=np.float32)[first:last]}, 0.0, {})

    def score_together(self, cuts: tuple[tuple[int, int], ...], *images: np.ndarray) -> list[Scored]:
        """Score several tasks."""
        return [self.score(batch, *cut) for cut, batch in zip(cuts, images, strict=True)]
