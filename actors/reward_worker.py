"""RewardWorker: score images or clips. Only a finite number for each is accepted as a score."""

import time
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.contract import under_contract
from ray_ddpo.actors.rewards.failure import scoring_failed
from ray_ddpo.actors.rewards.frames import FrameScoring, on_clips
from ray_ddpo.actors.rewards.reward import LoadedReward, Metered, Reward, RewardMistake
from ray_ddpo.actors.rewards.reward_trial import load_reward, try_rewards
from ray_ddpo.actors.rewards.score_cache import ScoreCache
from ray_ddpo.common.base_parts import Base, entry_base
from ray_ddpo.common.clips import are_clips
from ray_ddpo.common.machine import this_machine
from ray_ddpo.common.packages import require_packages
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.role_loading import loading
from ray_ddpo.common.runtime import python_stacks, settle, torch_settings_kept
from ray_ddpo.common.trajectory import ImageBatch, Scores, summed_usage
from ray_ddpo.common.user_code.blame import converting_errors


class RewardWorker:
    """The loaded rewards of a worker, by name. Scores batches of a fixed size, cut from a task in order."""

    def __init__(
        self,
        rewards: dict[str, Reward],
        table: RewardPoolTable,
        runtime: RuntimeTable,
        tried: bool = False,
        frames: Mapping[str, FrameScoring] | None = None,
    ) -> None:
        """Load the rewards.

        Args:
            tried: score synthetic images with the user's rewards first, to find mistakes early.
            frames: how each reward scores the frames of a clip, by name; by default their mean.
        """
        self._called = f"RewardWorker of {', '.join(rewards)}"
        self._rewards: dict[str, LoadedReward] = {}
        self._meters: dict[str, Metered] = {}
        device = settle(runtime)
        self._base: Base = {}
        for name, reward in rewards.items():
            with torch_settings_kept(), loading(f"the reward is {name!r}", reward.needs):
                # Again here, because this may be another machine than the driver's.
                require_packages(f"the recipe's reward.{name}", *reward.required_packages)
                loaded = load_reward(reward, device)
                self._rewards[name] = under_contract(loaded, f"the reward {name!r}")
                if isinstance(loaded, Metered):
                    self._meters[name] = loaded
            self._base |= entry_base(reward, "reward", reward.needs(), name)
        if tried:
            try_rewards(rewards, self._rewards)
        for name, reward in rewards.items():
            scoring = (frames or {}).get(name, FrameScoring())
            who = f"the reward {name!r}"
            self._rewards[name] = on_clips(self._rewards[name], reward, who, scoring, table.batch_size)
        if table.cache:
            self._rewards |= {
                name: ScoreCache(self._rewards[name], table.cache)
                for name, reward in rewards.items()
                if reward.independent_of_batch
            }
        self._batch_size = table.batch_size
        self._machine = this_machine(device)
        self._called += f" on {device}"

    def __repr__(self) -> str:
        """Return the name on the dashboard's page of actors, beside run, role and number."""
        return self._called

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names."""
        return tuple(self._rewards)

    def ready(self) -> Base:
        """Return the fingerprints of the loaded files. The call returns when everything is loaded."""
        return self.loaded_parts()

    def loaded_parts(self) -> Base:
        """Return the fingerprints of the files that the rewards were loaded from."""
        return self._base

    def stacks(self) -> str:
        """Return the stacks of this process's threads. Answered from a separate thread while a batch is scored."""
        return python_stacks()

    def score(
        self,
        images: ImageBatch,
        first: int = 0,
        last: int | None = None,
        note: Callable[[int], None] | None = None,
    ) -> Scores:
        """Compute all rewards of the images, or clips, `first` … `last` − 1.

        An image without a finite score is dropped, with the reason.

        Args:
            note: called with the row of each image before that image is scored alone, to find an image that kills this
                process. Without `note`, images are scored in batches.

        Raises:
            RewardMistake: a reward returned the wrong shape or type.
            ScoringFailed: a reward raised an error.
        """
        start = time.perf_counter()
        wanted = range(len(images.prompts))[first:last]
        if note:
            return self._score_one_by_one(images, wanted, note)
        rewards = {name: self._score_all(name, reward, images, wanted) for name, reward in self._rewards.items()}
        dropped, kind = {}, "clip" if are_clips(images.pixels) else "image"
        for name, values in rewards.items():
            for row in np.flatnonzero(~np.isfinite(values)):
                prompt = images.prompts[first + int(row)].text
                number = f"{values[row]}" + (", or a number beyond float32," if np.isinf(values[row]) else "")
                dropped[int(row)] = f"the reward {name!r} gave {number} for the {kind} of {prompt!r}"
                values[row] = np.nan
        machines = frozenset({self._machine})
        return Scores(rewards, time.perf_counter() - start, dropped, machines, self._usage())

    def score_together(self, cuts: tuple[tuple[int, int], ...], *images: ImageBatch) -> list[Scores]:
        """Score images of several tasks as one batch, for rewards that are independent of the batch.

        Args:
            cuts: (`first`, `last`) for each task, whose images `first` … `last` − 1 are scored.
            images: the tasks' images.

        Returns:
            The scores of each task's images.
        """
        pieces = [batch.pixels[first:last] for (first, last), batch in zip(cuts, images, strict=True)]
        prompts = [
            prompt for (first, last), batch in zip(cuts, images, strict=True) for prompt in batch.prompts[first:last]
        ]
        together = self.score(ImageBatch(np.concatenate(pieces), tuple(prompts)))
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return [_rows(together, end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]

    def _score_one_by_one(self, images: ImageBatch, wanted: range, note: Callable[[int], None]) -> Scores:
        """Score images alone, so that the one that ends the process is known: `note` is told the row beforehand."""
        start, parts = time.perf_counter(), []
        for row in wanted:
            note(row)
            parts.append(self.score(images, row, row + 1))
        rewards = {name: np.concatenate([part.rewards[name] for part in parts]) for name in self._rewards}
        dropped = {row: reason for row, part in enumerate(parts) for reason in part.dropped.values()}
        usage = summed_usage([part.usage for part in parts])
        return Scores(rewards, time.perf_counter() - start, dropped, usage=usage)

    def _usage(self) -> dict[str, float]:
        """Return what the rewards cost since the last call, also in calls that failed."""
        return {
            f"{name}/{count}": value
            for name, meter in self._meters.items()
            for count, value in meter.take_usage().items()
        }

    def _score_all(self, name: str, reward: LoadedReward, images: ImageBatch, wanted: range) -> Float[np.ndarray, "B"]:
        """Score the wanted rows with one reward, batch by batch. Raise ScoringFailed if the reward raises."""

        def converted(error: BaseException) -> BaseException:
            return error if isinstance(error, RewardMistake) else scoring_failed(name, error)

        parts = []
        for start in range(wanted.start, wanted.stop, self._batch_size):
            part = slice(start, min(start + self._batch_size, wanted.stop))
            texts = [prompt.text for prompt in images.prompts[part]]
            metadata = [prompt.metadata for prompt in images.prompts[part]]
            # One batch must not end a run of many hours.
            with converting_errors(converted), torch_settings_kept():
                parts.append(reward(images.pixels[part], texts, metadata))
        return np.concatenate(parts)


def _rows(scores: Scores, first: int, last: int) -> Scores:
    """Return the scores of some rows of a batch, with their share of its seconds and costs."""
    count = len(next(iter(scores.rewards.values())))
    rewards = {name: values[first:last] for name, values in scores.rewards.items()}
    dropped = {row - first: reason for row, reason in scores.dropped.items() if first <= row < last}
    share = (last - first) / count
    usage = {name: value * share for name, value in scores.usage.items()}
    return Scores(rewards, scores.seconds * share, dropped, scores.machines, usage)
