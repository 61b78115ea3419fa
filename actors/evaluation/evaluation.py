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
    """The images to compare: never those of training, whose seeds belong to another stream."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    batch_size: int

    @property
    def num_tasks(self) -> int:
        return -(-len(self.seeds) // self.batch_size)

    def tasks(self, policy_version: int, round: int, first: int, sampling: SamplingTable) -> list[Task]:
        """The set's images for the stream, numbered from `first`; sampled behind what is learned from in `round`."""
        window = evaluation_window(sampling)
        starts = range(0, len(self.seeds), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return [
            Task(round, index, policy_version, self.prompts[part], self.seeds[part], window, Stream.EVALUATION)
            for index, part in enumerate(parts, first)
        ]


@dataclass(frozen=True)
class Comparison:
    """The same images, same prompts and noise, under the pretrained weights and under a run's."""

    chosen: EvaluationSet
    before: UInt8[np.ndarray, "N H W 3"]
    after: UInt8[np.ndarray, "N H W 3"]
    scores_before: dict[str, np.ndarray]  # by scorer, [N]; "reward" is the weighted sum that was trained on
    scores_after: dict[str, np.ndarray]


def evaluation_set(table: EvaluationTable, source: PromptSource) -> EvaluationSet:
    """The recipe's prompts, else those that its source leaves out, else all of it, in turn until there are enough images."""
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
    """The set's images under the policy's present weights."""
    images = []
    for start in range(0, len(chosen.seeds), chosen.batch_size):
        part = slice(start, start + chosen.batch_size)
        texts = [prompt.text for prompt in chosen.prompts[part]]
        trajectory = sample_trajectories(policy, texts, list(chosen.seeds[part]), sampling, evaluation_window(sampling))
        images.append(decoded(policy, trajectory, texts))
    return np.concatenate(images)


def decoded(policy: Policy, trajectory: Trajectory, prompts: list[str]) -> UInt8[np.ndarray, "B H W 3"]:
    """Return the images at the end of the paths. ValueError: one is no finite number, and so no image."""
    pixels = policy.decode(trajectory.final_latents).cpu().numpy()
    if rows := policy.not_finite:
        raise ValueError(
            f"the image of {prompts[rows[0]]!r} is not finite ({len(rows)} of {len(prompts)}): its latents or its pixels are NaN "
            "or infinite, so the model or its trained weights overflow; try policy.dtype float32, or an earlier version"
        )
    return pixels
