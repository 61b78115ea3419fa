"""Frozen records that cross processes between sampler, reward worker and learner."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from ray_ddpo.common.clips import Pixels, posters
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.schedule import Task

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Trajectory:
    """B denoising trajectories sampled by one policy version. Heavy: only the learner opens it.

    If the trained steps are adjacent, `latents` and `next_latents` are views of one tensor, and are sent as that
    tensor.
    """

    conditioning: dict[str, Tensor]  # of the P distinct prompts, as from the policy's `encode`
    prompt_index: Int[Tensor, "B"]  # each image's prompt among these
    steps: Int[Tensor, "B W"]  # the trained steps
    log_probs: Float[Tensor, "B W"]  # under the sampling policy; mean over latent elements, in nats
    latents: Float[Tensor, "B W C *S"]  # before each trained step
    next_latents: Float[Tensor, "B W C *S"]  # after it, rounded for storage
    final_latents: Float[Tensor, "B C *S"]
    # Where the learner begins again, for gradients of the reward: each image's step, and the latents before it.
    start_steps: Int[Tensor, "B"] | None = None
    start_latents: Float[Tensor, "B C *S"] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Serialize as numpy buffers, which Ray ships without a copy. Adjacent steps share one buffer."""
        shared = _shared_latents(self.latents, self.next_latents)
        heavy = (shared,) if shared is not None else (self.latents, self.next_latents)
        light = (self.prompt_index, self.steps, self.log_probs, self.final_latents, *self._starts)
        conditioning = {name: _to_wire(value) for name, value in self.conditioning.items()}
        return _from_wire, (
            conditioning,
            [_to_wire(tensor) for tensor in light],
            [_to_wire(tensor) for tensor in heavy],
        )

    @property
    def _starts(self) -> tuple[Tensor, ...]:
        return tuple(each for each in (self.start_steps, self.start_latents) if each is not None)

    @property
    def num_bytes(self) -> int:
        """Return the serialized size in bytes."""
        shared = _shared_latents(self.latents, self.next_latents)
        heavy = [shared] if shared is not None else [self.latents, self.next_latents]
        tensors = [
            *self.conditioning.values(),
            self.prompt_index,
            self.steps,
            self.log_probs,
            self.final_latents,
            *self._starts,
            *heavy,
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adjacent_latents(latents: Float[Tensor, "B W1 C *S"]) -> tuple[Tensor, Tensor]:
    """Return the latents before and after each of the W = W1 - 1 steps, as views of `latents`."""
    return latents[:, :-1], latents[:, 1:]


def _shared_latents(latents: Tensor, next_latents: Tensor) -> Tensor | None:
    """Return the tensor that both are views of; None if the steps are not adjacent."""
    stride = latents.stride()
    same = (
        stride == next_latents.stride()
        and latents.untyped_storage().data_ptr() == next_latents.untyped_storage().data_ptr()
    )
    if not same or latents.shape[1] == 0 or next_latents.storage_offset() != latents.storage_offset() + stride[1]:
        return None
    shape = (latents.shape[0], latents.shape[1] + 1, *latents.shape[2:])
    return torch.as_strided(latents, shape, stride, latents.storage_offset())


Wire = tuple[str, np.ndarray]


def _to_wire(tensor: Tensor) -> Wire:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16: its bits travel as integers
        return "bfloat16", tensor.view(torch.int16).numpy()
    return "", tensor.numpy()


def _tensor(wire: Wire) -> Tensor:
    """Return the tensor of a buffer."""
    kind, array = wire
    with warnings.catch_warnings():
        # Buffers from Ray's store are read-only, and no code writes to a trajectory in place.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor


def _from_wire(conditioning: dict[str, Wire], light: list[Wire], heavy: list[Wire]) -> Trajectory:
    """Rebuild a trajectory from its buffers."""
    prompt_index, steps, log_probs, final_latents, *starts = [_tensor(wire) for wire in light]
    latents, next_latents = (
        adjacent_latents(_tensor(heavy[0])) if len(heavy) == 1 else [_tensor(wire) for wire in heavy]
    )
    return Trajectory(
        {name: _tensor(wire) for name, wire in conditioning.items()},
        prompt_index,
        steps,
        log_probs,
        latents,
        next_latents,
        final_latents,
        *starts,
    )


@dataclass(frozen=True)
class ImageBatch:
    """A task's images, or its clips of F frames, on their way to the reward worker."""

    pixels: Pixels
    prompts: tuple[Prompt, ...]
    frame_rate: float | None = None  # of clips, in frames a second


def image_fingerprints(pixels: Pixels) -> tuple[str, ...]:
    """Return the SHA-256 of each image's pixels, or of all frames of each clip."""
    return tuple(hashlib.sha256(np.ascontiguousarray(image).data).hexdigest() for image in pixels)


@dataclass(frozen=True)
class TaskReport:
    """A sampled task's report to the driver: small, with proof of which weights sampled it."""

    task: Task
    fingerprint: str  # of the weights that sampled it
    num_loaded_params: int  # parameters that the sampler has loaded
    trajectory_bytes: int
    seconds: float
    image_fingerprints: tuple[str, ...] = ()  # SHA-256 of each image's pixels
    sampled_by: str = ""  # host and process
    machine: Machine | None = None  # where it was sampled
    dropped: dict[int, str] = field(default_factory=dict)  # row → why it has no image
    path_kl: tuple[float, ...] = ()  # each trajectory's KL to the pretrained model in nats, if the recipe asks for it
    thumbnails: tuple[bytes, ...] = ()  # each image's RGB at 16 × 16 pixels, if the recipe asks for it


@dataclass(frozen=True)
class Scores:
    """A task's rewards by the reward's name. A dropped image has NaN and a reason; it is never scored 0."""

    rewards: dict[str, Float[np.ndarray, "B"]]
    seconds: float
    dropped: dict[int, str] = field(default_factory=dict)  # row → why it could not be scored
    machines: frozenset[Machine] = frozenset()  # where it was scored
    usage: dict[str, float] = field(default_factory=dict)  # what scoring cost, such as "vlm_judge/input_tokens"


def summed_usage(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the sum of counts by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def merged_scores(parts: list[Scores]) -> Scores:
    """Merge one task's scores by different rewards. An image that one reward dropped is dropped."""
    rewards = {name: values for part in parts for name, values in part.rewards.items()}
    reasons = {row: reason for part in reversed(parts) for row, reason in part.dropped.items()}
    machines = frozenset().union(*(part.machines for part in parts))
    seconds, usage = sum(part.seconds for part in parts), summed_usage([part.usage for part in parts])
    return Scores(rewards, seconds, dict(sorted(reasons.items())), machines, usage)


def unscored(names: Sequence[str], report: TaskReport) -> Scores:
    """Return the scores of a task that has no images."""
    images = len(report.task.seeds)
    return Scores({name: np.full(images, np.nan, np.float32) for name in names}, 0.0, dict(report.dropped))


@dataclass(frozen=True)
class Rollout:
    """A sampled and scored task. On Ray, `trajectory` and `images` are references that the driver never opens."""

    report: TaskReport
    scores: Scores
    trajectory: Any
    images: Any


THUMBNAIL_EDGE = 16  # pixels: images are compared by composition and color, not by texture


def thumbnails(pixels: Pixels) -> UInt8[np.ndarray, "B E E 3"]:
    """Reduce images, or the posters of clips, to 16 × 16 pixels, each the mean of its area."""
    size, box = (THUMBNAIL_EDGE, THUMBNAIL_EDGE), Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(image).resize(size, box)) for image in posters(pixels)])


def thumbnail_rows(rollouts: Sequence[Rollout]) -> UInt8[np.ndarray, "N D"]:
    """Return the thumbnails of a round's images as rows; without columns if samplers sent none."""
    reports = [rollout.report for rollout in rollouts]
    blank = bytes(3 * THUMBNAIL_EDGE**2 if any(report.thumbnails for report in reports) else 0)
    rows = [each for report in reports for each in report.thumbnails or (blank,) * len(report.task.seeds)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), len(blank))


def path_kls(rollouts: list[Rollout]) -> Float[np.ndarray, "N"]:
    """Return each image's KL of its trajectory to the pretrained model in nats; empty if samplers measured none."""
    return np.array([nats for rollout in rollouts for nats in rollout.report.path_kl], np.float64)


@dataclass(frozen=True)
class TrainBatch:
    """The advantages of a round, or of a part of it, in task order. The trajectories are passed separately."""

    round: int
    reports: tuple[TaskReport, ...]
    advantages: Float[np.ndarray, "N"]  # the learning signal: an advantage, or RWR's weight
    dropped: tuple[int, ...] = ()  # images, in task order, that are not trained on: their advantage is NaN
    part: int = 0
    parts: int = 1  # of the round, of equal size
    aggregated_rewards: dict[str, Float[np.ndarray, "N"]] = field(
        default_factory=dict
    )  # rewards as aggregated, if transformed
    kl_weights: Float[np.ndarray, "N"] | None = None  # 1 if an image has the KL to the reference; None: all have it

    @property
    def replayed(self) -> tuple[int, ...]:
        """Return the images of earlier rounds, which are trained on again with this one."""
        rounds = [report.task.round for report in self.reports for _ in report.task.seeds]
        return tuple(image for image, of_round in enumerate(rounds) if of_round != self.round)


Scored = tuple[TrainBatch, list[Rollout]]  # a round, or a part of it


def whole_round(parts: list[TrainBatch]) -> TrainBatch:
    """Concatenate all parts of a round."""
    assert [batch.part for batch in parts] == list(range(parts[0].parts)), "a round has all of its parts, in order"
    reports = tuple(report for batch in parts for report in batch.reports)
    advantages = np.concatenate([batch.advantages for batch in parts])
    size = len(parts[0].advantages)
    dropped = tuple(batch.part * size + image for batch in parts for image in batch.dropped)
    aggregated_rewards = {
        name: np.concatenate([batch.aggregated_rewards[name] for batch in parts])
        for name in parts[0].aggregated_rewards
    }
    gates = [batch.kl_weights for batch in parts if batch.kl_weights is not None]
    kl_weights = np.concatenate(gates) if gates else None
    return TrainBatch(
        parts[0].round, reports, advantages, dropped, aggregated_rewards=aggregated_rewards, kl_weights=kl_weights
    )


# The columns of a batch that an algorithm asks for by name: outputs under other weights than the current ones.
Column = Literal[
    "proximal_log_probs",
    "proximal_means",
    "behavior_means",
    "reference_means",
    "old_predictions",
    "reference_predictions",
    "old_errors",
    "reference_errors",
]
COLUMNS: tuple[Column, ...] = get_args(Column)
# The columns with one number per row; the others have latents.
NUMBER_COLUMNS: frozenset[Column] = frozenset({"proximal_log_probs", "old_errors", "reference_errors"})


@dataclass(frozen=True)
class TransitionBatch:
    """B transitions on the device, with any mix of images and steps, as input of a policy-gradient loss.

    The columns are set if the algorithm asks for them. None means that the current pass has those weights.
    """

    conditioning: dict[str, Tensor]  # one row per transition
    steps: Int[Tensor, "B"]
    latents: Float[Tensor, "B C *S"]
    next_latents: Float[Tensor, "B C *S"]
    old_log_probs: Float[Tensor, "B"]
    advantages: Float[Tensor, "B"]
    proximal_log_probs: Float[Tensor, "B"] | None = None  # under the weights at the start of the round's update
    proximal_means: Float[Tensor, "B C *S"] | None = None  # transition means under those weights
    behavior_means: Float[Tensor, "B C *S"] | None = None  # transition means under the sampling policy
    reference_means: Float[Tensor, "B C *S"] | None = None  # transition means under the reference
    kl_weights: Float[Tensor, "B"] | None = None  # factors of the KL to the reference; None: all are 1


@dataclass(frozen=True)
class NoisedBatch:
    """B noised samples of final images, on the device, as input of a forward-process loss.

    The columns are set if the algorithm asks for them. None means that the current pass has those weights.
    """

    conditioning: dict[str, Tensor]  # one row per noised sample
    timesteps: Int[Tensor, "B"]  # the model's own
    clean_latents: Float[Tensor, "B C *S"]
    noise: Float[Tensor, "B C *S"]
    weights: Float[Tensor, "B"]
    old_predictions: Float[Tensor, "B C *S"] | None = None  # under the sampling policy
    reference_predictions: Float[Tensor, "B C *S"] | None = None  # under the pretrained model
    old_errors: Float[Tensor, "B"] | None = None  # mean squared errors of the prediction, under the sampling policy
    reference_errors: Float[Tensor, "B"] | None = None  # the same under the pretrained model
    groups: Int[Tensor, "B"] | None = None  # number of the rows that are compared with each other; None: none are
    # Of a loss that compares groups: value, slope in the row's error, agreement, clipping. None: the batch has complete
    # groups as neighbors, so that they follow from its own errors.
    coupling: Float[Tensor, "B 4"] | None = None


@dataclass(frozen=True)
class RestartBatch:
    """B restarts of sampled trajectories, on the device, as input of a loss on the reward's gradient.

    The steps from `starts` on are taken again. Before them nothing has a gradient, so that backpropagation ends there.
    """

    conditioning: dict[str, Tensor]  # one row per restart
    starts: tuple[int, ...]  # the first step of each row that is taken again
    latents: Float[Tensor, "B C *S"]  # before that step
    noise: dict[int, Float[Tensor, "B C *S"]]  # of each stochastic step from the first start on; others have none
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    latents_dtype: str = "float32"  # to which the sampler rounded latents after each step
