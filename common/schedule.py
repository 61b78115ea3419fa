"""Pure arithmetic from a run's seed, a round and a task to policy version, prompts and seeds (no torch, no clock)."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ray_ddpo.common.policy_versions import policy_version
from ray_ddpo.common.prompts import Prompt, SampleGroups, SamplePrompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.sde_windows import window_of_round

Place = tuple[int, int, int]  # a task's round, stream and index, which also order all tasks


class Stream(IntEnum):
    """The purpose of an image's seed, stored in the seed's two lowest bits: no two purposes can share a seed."""

    TRAINING = 0
    EVALUATION = 1
    TUNING = 2
    CHECKING = 3


# Further random streams, which give no image seeds.
_PROMPTS = 4
_ORDER = 5  # 6 is that of SDE windows


@dataclass(frozen=True)
class Task:
    """One call of a sampler: prompts with their seeds, under one policy version."""

    round: int
    index: int  # within the round
    policy_version: int
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]  # one per image, from which all of its noise comes
    window: range | None = None  # the stochastic steps, which are trained on; None: all are stochastic
    stream: Stream = Stream.TRAINING  # the purpose of its seeds
    prefix_seeds: tuple[int, ...] | None = None  # one per image: of the noise that its group begins with, if shared
    sampling: SamplingTable | None = None  # of held-out images, if their settings are not those of training

    @property
    def place(self) -> Place:
        """Return the task's identity, which also orders all tasks of the run. Evaluation comes last in a round."""
        return self.round, int(self.stream), self.index

    @property
    def trains(self) -> bool:
        """Return whether the task is trained on."""
        return self.stream == Stream.TRAINING

    @property
    def title(self) -> str:
        """Return the task's title, such as `round 12, task 3 (version 11)` or `evaluation of version 4, task 0`."""
        version = f" (version {self.policy_version})" if self.trains else ""
        return f"{self.title_of_round}, task {self.index}{version}"

    @property
    def title_of_round(self) -> str:
        """Return the title of what the task belongs to: `round 12`, or `evaluation of version 4`."""
        return f"round {self.round}" if self.trains else f"evaluation of version {self.policy_version}"


def image_seed(run_seed: int, stream: Stream, round_index: int, image: int) -> int:
    """Return an image's seed, 0 … 2**63 − 1: a hash of its position in the run, with the stream in the lowest bits."""
    word = np.random.SeedSequence([run_seed, int(stream), round_index, image]).generate_state(1, np.uint64)[0]
    return int(word) >> 1 & ~0b11 | int(stream)


def sde_window_of_round(recipe: Recipe, round_index: int) -> range | None:
    """Return a round's SDE window (Flow-GRPO-Fast, MixGRPO): the stochastic, trained steps; None for all steps.

    All images of a round share one window, so that rewards within a group stay comparable. With a cache or another
    solver, and without a window, the first step alone is stochastic: its log-prob proves which weights sampled. If
    `sampling.deterministic`, that stochastic step is taken aside.
    """
    sampling = recipe.sampling
    if sampling.sde_window is None:
        return range(1) if sampling.trains_no_steps else None
    return window_of_round(sampling, recipe.seed, round_index)


def round_tasks(recipe: Recipe, round_index: int, sample: SamplePrompt, indices: range | None = None) -> list[Task]:
    """Return the tasks of a round, in order: a pure function of recipe and round, if `sample` is pure.

    Args:
        recipe: the recipe.
        round_index: the round.
        sample: samples prompts.
        indices: of consecutive tasks; by default those that every round has. Further ones continue the sequence.
    """
    group, size = recipe.prompts.images_per_prompt, recipe.sampling.batch_size
    indices = range(recipe.sampling.batches_per_round) if indices is None else indices
    images = range(indices.start * size, indices.stop * size)
    groups = range(images.start // group, -(-images.stop // group))
    if isinstance(sample, SampleGroups):
        before = round_index * (recipe.images_per_round // group)
        of_groups = [sample.group(recipe.seed, before + number) for number in groups]
    else:
        generators = [np.random.default_rng([recipe.seed, _PROMPTS, round_index, number]) for number in groups]
        of_groups = [(sample(generator),) * group for generator in generators]
    prompts = tuple(of_groups[image // group - groups.start][image % group] for image in images)
    seeds = tuple(image_seed(recipe.seed, Stream.TRAINING, round_index, image) for image in images)
    version, window = policy_version(round_index, recipe.max_policy_lag), sde_window_of_round(recipe, round_index)
    # An image's group begins with the noise of the group's first image.
    firsts = [image_seed(recipe.seed, Stream.TRAINING, round_index, number * group) for number in groups]
    shared = tuple(firsts[image // group - groups.start] for image in images)
    prefix = shared if recipe.sampling.shared_prefix else None
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    return [
        Task(round_index, index, version, prompts[part], seeds[part], window, prefix_seeds=prefix and prefix[part])
        for index, part in zip(indices, parts, strict=True)
    ]


def round_parts(recipe: Recipe) -> list[range]:
    """Return the task indices of each part of a round that gets its own update. By default a round is one part."""
    size = recipe.sampling.batches_per_round // recipe.learner.parts_per_round
    return [range(first, first + size) for first in range(0, recipe.sampling.batches_per_round, size)]


def transition_order(
    run_seed: int, round_index: int, inner_epoch: int, count: int, place: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """Return the order in which an inner epoch takes the `count` images of a part of a round.

    A part's images keep their relative order in the full round. The order depends on the position in the run only.
    `place` is (part, number of parts).
    """
    part, parts = place
    order = np.random.default_rng([run_seed, _ORDER, round_index, inner_epoch]).permutation(count * parts)
    return order[order // count == part] - part * count
