"""Evaluation: fixed prompts and fixed seeds, sampled and scored in the same way at every version."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import evaluation_window, sample_trajectories
from ray_ddpo.common.prompts import Prompt, PromptSource
from ray_ddpo.common.recipe.tables import EvaluationTable, SamplingTable
from ray_ddpo.common.schedule import Stream, Task, image_seed
from ray_ddpo.common.trajectory import Trajectory


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts and seeds of evaluation. They are never those of training, whose seeds are of another stream."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    batch_size: int

    @property
    def num_tasks(self) -> int:
        return -(-len(self.seeds) // self.batch_size)

    def tasks(self, policy_version: int, round_index: int, first: int, sampling: SamplingTable) -> list[Task]:
        """Return the set's tasks, numbered from `first`, to be sampled after the training tasks of `round_index`."""
        window = evaluation_window(sampling)
        starts = range(0, len(self.seeds), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return [
            Task(round_index, index, policy_version, self.prompts[part], self.seeds[part], window, Stream.EVALUATION)
            for index, part in enumerate(parts, first)
        ]


@dataclass(frozen=True)
class Comparison:
    """Images of the same prompts and noise under the pretrained weights and under a run's weights."""

    chosen: EvaluationSet
    before: UInt8[np.ndarray, "N H W 3"]
    after: UInt8[np.ndarray, "N H W 3"]
    scores_before: dict[str, np.ndarray]  # by scorer, [N]; "reward" is the weighted sum that was trained on
    scores_after: dict[str, np.ndarray]


def evaluation_set(table: EvaluationTable, source: PromptSource) -> EvaluationSet:
    """Return the evaluation set of a recipe.

    Its prompts are those of the table, else the held-out prompts of the source, else prompts sampled from the source.
    The former two are repeated in turn until there are enough images.
    """
    stream = Stream.EVALUATION if table.split == "evaluation" else Stream.TUNING
    chosen = source.evaluated(table.prompts)
    if chosen:
        prompts = [chosen[image % len(chosen)] for image in range(table.images)]
    else:
        sample_prompt = source.load()
        prompts = [
            sample_prompt(np.random.default_rng([table.seed, int(stream), image])) for image in range(table.images)
        ]
    seeds = [image_seed(table.seed, stream, 0, image) for image in range(table.images)]
    return EvaluationSet(tuple(prompts), tuple(seeds), table.batch_size)


def evaluation_images(policy: Policy, chosen: EvaluationSet, sampling: SamplingTable) -> UInt8[np.ndarray, "N H W 3"]:
    """Sample the set's images under the policy's current weights."""
    images = []
    for start in range(0, len(chosen.seeds), chosen.batch_size):
        part = slice(start, start + chosen.batch_size)
        texts = [prompt.text for prompt in chosen.prompts[part]]
        trajectory = sample_trajectories(policy, texts, list(chosen.seeds[part]), sampling, evaluation_window(sampling))
        images.append(decoded(policy, trajectory, texts))
    return np.concatenate(images)


def decoded(policy: Policy, trajectory: Trajectory, prompts: list[str]) -> UInt8[np.ndarray, "B H W 3"]:
    """Decode the final latents of trajectories.

    Raises:
        ValueError: an image is not finite.
    """
    pixels = policy.decode(trajectory.final_latents).cpu().numpy()
    if rows := policy.not_finite:
        raise ValueError(
            f"the image of {prompts[rows[0]]!r} is not finite ({len(rows)} of {len(prompts)}): its latents or its "
            "pixels are NaN or infinite, so the model or its trained weights overflow; try policy.dtype float32, or "
            "an earlier version"
        )
    return pixels
