"""EvalSet: held-out prompts and seeds, sampled and scored in the same way for every policy version."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ray_ddpo.common.clips import Pixels
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import evaluation_window, inputs_of, sample_trajectories
from ray_ddpo.common.prompts import Prompt, PromptSource
from ray_ddpo.common.recipe.tables import EvaluationTable, SamplingTable
from ray_ddpo.common.schedule import Stream, Task, image_seed
from ray_ddpo.common.suite_prompts import followed_prompts
from ray_ddpo.common.suites import Suite
from ray_ddpo.common.trajectory import Trajectory

IMAGES = 64  # of an evaluation, if neither the recipe nor a suite says how many


@dataclass(frozen=True)
class EvalSet:
    """Held-out images to sample: one prompt and one seed an image. Training never uses these seeds."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    batch_size: int
    suite: Suite | None = None  # that it follows
    suite_images: int = 0  # of the complete suite

    @property
    def in_words(self) -> str:
        """Name the images: `64 held-out images`, or `96 of the 192 images of the suite shapes`."""
        return images_in_words(len(self.seeds), self.suite, self.suite_images)

    @property
    def parts(self) -> list[slice]:
        """Return the images of each task."""
        return [slice(start, start + self.batch_size) for start in range(0, len(self.seeds), self.batch_size)]

    @property
    def num_tasks(self) -> int:
        return len(self.parts)

    def tasks(self, policy_version: int, round_index: int, first: int, sampling: SamplingTable) -> list[Task]:
        """Return the tasks that sample this set under one policy version, numbered from `first`.

        Samplers take them after the training tasks of round `round_index`. `sampling` is that of held-out images.
        """
        window, stream = evaluation_window(sampling), Stream.EVALUATION
        prompts, seeds = [self.prompts[part] for part in self.parts], [self.seeds[part] for part in self.parts]
        return [
            Task(round_index, index, policy_version, *of_task, window, stream, sampling=sampling)
            for index, of_task in enumerate(zip(prompts, seeds, strict=True), first)
        ]


def build_eval_set(table: EvaluationTable, source: PromptSource) -> EvalSet:
    """Choose prompts and seeds from `[evaluation]`.

    Prompts are those of the suite, else of `evaluation.prompts`, else the held-out prompts of the source, else all of
    its prompts. They are repeated in turn until there are enough images. Of more prompts than images, some are taken at
    equal distances, because lists are often sorted. If the source is a function and lists no prompts, they are sampled
    from the function with seeds that training never uses. Fewer images than a suite has are some of the suite's
    images, with their seeds.

    Raises:
        ValueError: the suite's prompts were not fetched, or it has fewer images than are asked for.
    """
    stream = Stream.EVALUATION if table.split == "evaluation" else Stream.TUNING
    chosen = followed_prompts(table) if table.followed else source.evaluated(table.prompts)
    images = num_images(table, len(chosen))
    numbers = list(range(images))
    if chosen:
        apart = max(1.0, len(chosen) / images)
        rows = [int(image * apart) for image in range(images)]
        prompts = [chosen[row % len(chosen)] for row in rows]
        numbers = rows if table.followed else numbers
    else:
        sample_prompt = source.load()
        prompts = [sample_prompt(np.random.default_rng([table.seed, int(stream), image])) for image in numbers]
    seeds = [image_seed(table.seed, stream, 0, number) for number in numbers]
    all_images = table.followed.all_images(len(chosen)) if table.followed else 0
    return EvalSet(tuple(prompts), tuple(seeds), table.batch_size, table.followed, all_images)


def images_in_words(count: int, suite: Suite | None, suite_images: int) -> str:
    """Name so many held-out images, which are some of the suite's if there is one."""
    if suite is None:
        return f"{count} held-out images"
    which = f"{count} of the {suite_images}" if count < suite_images else f"all {count}"
    return f"{which} images of the suite {suite.name}"


def num_images(table: EvaluationTable, num_prompts: int) -> int:
    """Return the images of an evaluation of so many prompts. Raise ValueError if they are more than the suite's."""
    if table.followed is None:
        return table.images or IMAGES
    all_images = table.followed.all_images(num_prompts)
    if (table.images or 0) > all_images:
        raise ValueError(
            f"evaluation.images is {table.images}, and the suite {table.suite!r} has {all_images} images, "
            f"{table.followed.images_per_prompt} of each of its {num_prompts} prompts: give fewer, or leave images out"
        )
    return table.images or all_images


def sample_eval_images(
    policy: Policy, chosen: EvalSet, sampling: SamplingTable, on_sampled: Callable[[int], None] = lambda images: None
) -> Pixels:
    """Sample the images, or clips, of a set under the policy's current weights.

    After each batch, `on_sampled` is called with the number of images sampled so far.
    """
    images = []
    for part in chosen.parts:
        texts, seeds = [prompt.text for prompt in chosen.prompts[part]], list(chosen.seeds[part])
        window, inputs = evaluation_window(sampling), inputs_of(policy, chosen.prompts[part])
        trajectory = sample_trajectories(policy, texts, seeds, sampling, window, inputs=inputs)
        images.append(decoded(policy, trajectory, texts))
        on_sampled(part.start + len(texts))
    return np.concatenate(images)


def decoded(policy: Policy, trajectory: Trajectory, prompts: list[str]) -> Pixels:
    """Decode the final latents of trajectories. Raise ValueError if latents or pixels are NaN or infinite."""
    pixels = policy.decode(trajectory.final_latents).cpu().numpy()
    if rows := policy.not_finite:
        raise ValueError(
            f"the image of {prompts[rows[0]]!r} is not finite ({len(rows)} of {len(prompts)}): its latents or its "
            "pixels are NaN or infinite, so the model or its trained weights overflow; try policy.dtype float32, or an "
            "earlier version"
        )
    return pixels
