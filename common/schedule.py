"""Pure arithmetic: from a run's seed, a round and a task to policy version, prompts and seeds (no torch, no clock)."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ray_ddpo.common.prompts import Prompt, SamplePrompt
from ray_ddpo.common.recipe.recipe import Recipe

Place = tuple[int, int, int]  # a task's round, what it is for, and its index there: also the order of all tasks


class Stream(IntEnum):
    """What an image's seed is for. It stands in the seed's two lowest bits: no two purposes can share a seed."""

    TRAINING = 0
    EVALUATION = 1
    TUNING = 2
    CHECKING = 3


# Streams of their own, which give no image seeds.
_PROMPTS = 4
_ORDER = 5
_WINDOW = 6


@dataclass(frozen=True)
class Task:
    """What a sampler does in one go: prompts with their seeds, under one policy version."""

    round: int
    index: int  # within the round
    policy_version: int
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]  # one an image; all of its noise comes from it
    window: range | None = None  # the steps that are sampled with noise and learned from; None: all have noise
    stream: Stream = Stream.TRAINING  # of its seeds

    @property
    def place(self) -> Place:
        """A task's name, and its order among all tasks of the run. In a round what is only looked at comes last."""
        return self.round, int(self.stream), self.index

    @property
    def trains(self) -> bool:
        """Whether it is learned from."""
        return self.stream == Stream.TRAINING

    @property
    def title(self) -> str:
        """What it is, for people: `round 12, task 3 (version 11)`, or `evaluation of version 4, task 0`."""
        version = f" (version {self.policy_version})" if self.trains else ""
        return f"{self.title_of_round}, task {self.index}{version}"

    @property
    def title_of_round(self) -> str:
        """What it is a task of: `round 12`, or `evaluation of version 4`."""
        return f"round {self.round}" if self.trains else f"evaluation of version {self.policy_version}"


def image_seed(run_seed: int, stream: Stream, round: int, image: int) -> int:
    """The seed of one image, 0 … 2**63 − 1: a hash of its place in the run, with its purpose in the lowest two bits."""
    word = np.random.SeedSequence([run_seed, int(stream), round, image]).generate_state(1, np.uint64)[0]
    return int(word) >> 1 & ~0b11 | int(stream)


def policy_version(round: int, max_policy_lag: int) -> int:
    """The version that a round is sampled with: `max_policy_lag` behind, but never before the first."""
    return max(0, round - max_policy_lag)


def last_startable_round(version: int, max_policy_lag: int) -> int:
    """The last round whose tasks may start once `version` is published: the back-pressure."""
    return version + max_policy_lag


def sde_window_of_round(recipe: Recipe, round: int) -> range | None:
    """Which steps of a round are sampled with noise and learned from (Flow-GRPO-Fast, MixGRPO); None: all of them.

    One window for the whole round: images of a group that differ in it would be held against what is not their like.
    """
    sampling = recipe.sampling
    if sampling.sde_window is None:
        return None
    starts = sampling.num_steps - sampling.skip_last_steps - sampling.sde_window + 1
    place = round // sampling.sde_window_rounds
    start = place % starts
    if sampling.sde_window_order == "random":
        start = int(np.random.default_rng([recipe.seed, _WINDOW, place]).integers(starts))
    return range(start, start + sampling.sde_window)


def round_tasks(recipe: Recipe, round: int, sample: SamplePrompt) -> list[Task]:
    """All tasks of a round, in order. A pure function of the recipe and the round, given a pure `sample`."""
    group = recipe.prompts.images_per_prompt
    groups = range(-(-recipe.images_per_round // group))
    of_groups = [_sample_prompt(recipe.seed, round, number, sample) for number in groups]
    prompts = [of_groups[image // group] for image in range(recipe.images_per_round)]
    seeds = [image_seed(recipe.seed, Stream.TRAINING, round, image) for image in range(recipe.images_per_round)]
    size = recipe.sampling.batch_size
    version, window = policy_version(round, recipe.max_policy_lag), sde_window_of_round(recipe, round)
    return [
        Task(round, index, version, tuple(prompts[start : start + size]), tuple(seeds[start : start + size]), window)
        for index, start in enumerate(range(0, recipe.images_per_round, size))
    ]


def round_parts(recipe: Recipe) -> list[range]:
    """Indices of the tasks that are learned from together, part by part; a round is one part unless the recipe says more."""
    size = recipe.sampling.batches_per_round // recipe.learner.parts_per_round
    return [range(first, first + size) for first in range(0, recipe.sampling.batches_per_round, size)]


def _sample_prompt(run_seed: int, round: int, group: int, sample: SamplePrompt) -> Prompt:
    return sample(np.random.default_rng([run_seed, _PROMPTS, round, group]))


def transition_order(
    run_seed: int, round: int, inner_epoch: int, count: int, place: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """In which order an inner epoch takes the `count` images of a round, or of one of its parts; fixed by its place in the run.

    `place` is (part, parts). A part's images keep the order that they have among all of the round.
    """
    part, parts = place
    order = np.random.default_rng([run_seed, _ORDER, round, inner_epoch]).permutation(count * parts)
    return order[order // count == part] - part * count
