"""RewardWorker: pictures in, scores out; what is not one finite number a picture never passes as a score."""

import time

import numpy as np
from jaxtyping import Float

from actors.rewards.reward import LoadedReward, Reward, RewardMistake
from actors.rewards.reward_trial import load_reward, try_rewards
from actors.score_cache import ScoreCache
from common.recipe_tables import RewardPoolTable, RuntimeTable
from common.runtime import python_stacks, settle
from common.trajectory import ImageBatch, Scores


class ScoringFailed(Exception):
    """A reward raised an error over a batch of pictures; another attempt, or fewer pictures, may go better."""


class RewardWorker:
    """Holds the loaded rewards, by name, and scores batches of a set size cut from a task in order."""

    def __init__(
        self,
        rewards: dict[str, Reward],
        table: RewardPoolTable,
        runtime: RuntimeTable,
        tried: bool = False,
    ) -> None:
        """`tried`: whether rewards of the user's own score made-up images first."""
        device = settle(runtime)
        self._rewards = {name: load_reward(reward, device) for name, reward in rewards.items()}
        if tried:
            try_rewards(rewards, self._rewards)
        if table.cache:
            self._rewards |= {
                name: ScoreCache(self._rewards[name], table.cache)
                for name, reward in rewards.items()
                if reward.independent_of_batch
            }
        self._batch_size = table.batch_size
        self._device = device

    def __repr__(self) -> str:
        """As the dashboard's page of actors has it, beside run, role and number."""
        return f"RewardWorker of {', '.join(self.names)} on {self._device}"

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names."""
        return tuple(self._rewards)

    def ready(self) -> bool:
        """True, once the rewards are loaded."""
        return True

    def stacks(self) -> str:
        """What this process is doing; answered from a thread of its own while a batch is scored."""
        return python_stacks()

    def score(self, images: ImageBatch, first: int = 0, last: int | None = None) -> Scores:
        """Every reward of the pictures `first` … `last` − 1. One without a finite number is set aside, with the reason.

        RewardMistake: a reward gave the wrong shape or type. ScoringFailed: a reward raised an error of its own.
        """
        start = time.perf_counter()
        wanted = range(len(images.prompts))[first:last]
        rewards = {name: self._score_all(name, reward, images, wanted) for name, reward in self._rewards.items()}
        set_aside = {}
        for name, values in rewards.items():
            for row in np.flatnonzero(~np.isfinite(values)):
                prompt = images.prompts[first + int(row)].text
                set_aside[int(row)] = f"the reward {name!r} gave {values[row]} for the picture of {prompt!r}"
                values[row] = np.nan
        return Scores(rewards, time.perf_counter() - start, set_aside)

    def score_together(self, cuts: tuple[tuple[int, int], ...], *images: ImageBatch) -> list[Scores]:
        """The pictures `first` … `last` − 1 of several tasks as one batch, and each task's scores: for rewards independent
        of their batch.
        """
        pieces = [batch.pixels[first:last] for (first, last), batch in zip(cuts, images, strict=True)]
        prompts = [
            prompt for (first, last), batch in zip(cuts, images, strict=True) for prompt in batch.prompts[first:last]
        ]
        together = self.score(ImageBatch(np.concatenate(pieces), tuple(prompts)))
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return [_rows(together, end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]

    def _score_all(self, name: str, reward: LoadedReward, images: ImageBatch, wanted: range) -> Float[np.ndarray, "B"]:
        parts = []
        for start in range(wanted.start, wanted.stop, self._batch_size):
            part = slice(start, min(start + self._batch_size, wanted.stop))
            texts = [prompt.text for prompt in images.prompts[part]]
            metadata = [prompt.metadata for prompt in images.prompts[part]]
            try:
                values = reward(images.pixels[part], texts, metadata)
            except RewardMistake:
                raise
            # A user's reward may raise anything; over one batch of pictures, that must not end a run of many hours.
            except Exception as error:  # noqa: BLE001
                raise ScoringFailed(f"the reward {name!r} raised {type(error).__name__}: {error}") from error
            parts.append(_checked(name, values, len(texts)))
        return np.concatenate(parts)


def _rows(scores: Scores, first: int, last: int) -> Scores:
    """A part of a batch's scores; of its seconds, its share."""
    count = len(next(iter(scores.rewards.values())))
    rewards = {name: values[first:last] for name, values in scores.rewards.items()}
    set_aside = {row - first: reason for row, reason in scores.set_aside.items() if first <= row < last}
    return Scores(rewards, scores.seconds * (last - first) / count, set_aside)


def _checked(name: str, values: np.ndarray, count: int) -> Float[np.ndarray, "B"]:
    values = np.asarray(values)
    if values.shape != (count,) or not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise RewardMistake(
            f"the reward {name!r} returned {values.dtype} of shape {values.shape} for {count} pictures: "
            f"it must return one real number for each, shape ({count},)"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is set aside as that
        return values.astype(np.float32)
