"""The prompt source `preferences`: pairs of a preference file, whose images are trained on in place of sampled ones."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from ray_ddpo.common.preference_rows import SIDES, PreferenceRows, fitted, preference_rows
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.prompts import GivenImages, Prompt, PromptSource, SampleGroups
from ray_ddpo.common.recipe.named_files import Weights

MOST_CHECKED = 1000  # pairs whose images are decoded before a run starts
# Random streams beside those of `common/schedule.py` and `common/diffusion/rollout.py`.
_ORDER = 13
_CHANGES = 14


class Preferences(PromptSource):
    """Pairs of a preference file: a group is a prompt with its chosen and its rejected image. No image is sampled.

    All pairs come once, in an order of their own, before any comes again.
    """

    path: str
    """Preference file: parquet or JSON lines with the columns `prompt`, `chosen` and `rejected`."""
    held_out_prompts: tuple[str, ...] = ()
    """Prompts that are held out: their pairs are not trained on, and evaluation samples these prompts."""
    empty_prompts: float = Field(default=0.0, ge=0, lt=1)
    """Share of pairs that are trained on with an empty prompt, so that the unconditional branch of guidance learns too."""
    horizontal_flip: bool = False
    """Mirror half of the images, each for itself."""

    @property
    def gives_images(self) -> bool:
        return True

    def _file(self) -> Path:
        return Path(os.path.expanduser(self.path))

    def needs(self) -> tuple[Weights, ...]:
        path = self._file().absolute()
        return (Weights(str(path.parent), (path.name,), "prompts.path"),)

    def _trained(self) -> list[int]:
        """Return the rows that are trained on. Raise ValueError if a held-out prompt is unknown, or if none remains."""
        prompts = preference_rows(self._file()).prompts
        if unknown := sorted(set(self.held_out_prompts) - set(prompts)):
            raise ValueError(f"prompts.held_out_prompts has {unknown}, which is no prompt of {self.path}")
        rows = [row for row, prompt in enumerate(prompts) if prompt not in self.held_out_prompts]
        if not rows:
            raise ValueError(f"prompts.held_out_prompts has all prompts of {self.path}: there is nothing to train on")
        return rows

    def load(self) -> "SamplePairs":
        prompts = preference_rows(self._file()).prompts
        return SamplePairs(prompts, np.array(self._trained()), self.empty_prompts, self.horizontal_flip)

    def listed(self) -> list[str]:
        prompts = preference_rows(self._file()).prompts
        return list(dict.fromkeys(prompts[row] for row in self._trained()))

    def held_out(self) -> list[str]:
        return list(self.held_out_prompts)

    def check(self) -> None:
        rows = preference_rows(self._file())
        rows.check_images(MOST_CHECKED)
        if len(rows.prompts) > MOST_CHECKED:
            print_line(
                f"prompts.path: checked the images of {MOST_CHECKED:,} of {len(rows.prompts):,} pairs; "
                f"`ddpo preferences {self.path}` checks all"
            )

    def load_images(self) -> "PreferenceImages":
        return PreferenceImages(preference_rows(self._file()))


class SamplePairs(SampleGroups):
    """Pairs in an order that differs in each pass over the file, as a function of the run's seed."""

    def __init__(
        self, prompts: list[str], rows: np.ndarray, empty_prompts: float = 0.0, horizontal_flip: bool = False
    ) -> None:
        self._prompts = prompts
        self._rows = rows  # that are trained on
        self._empty_prompts = empty_prompts
        self._horizontal_flip = horizontal_flip
        self._shuffled: tuple[tuple[int, int], np.ndarray] | None = None  # of the last run's seed and pass asked for

    def __call__(self, generator: np.random.Generator) -> Prompt:
        return self._pair(int(self._rows[generator.integers(len(self._rows))]))[0]

    def group(self, run_seed: int, number: int) -> tuple[Prompt, ...]:
        epoch, place = divmod(number, len(self._rows))
        if self._shuffled is None or self._shuffled[0] != (run_seed, epoch):
            order = np.random.default_rng([run_seed, _ORDER, epoch]).permutation(self._rows)
            self._shuffled = (run_seed, epoch), order
        changes = np.random.default_rng([run_seed, _CHANGES, number]).random(3)
        flips = (changes[1:] < 0.5) & self._horizontal_flip
        return self._pair(int(self._shuffled[1][place]), bool(changes[0] < self._empty_prompts), tuple(flips.tolist()))

    def _pair(self, row: int, empty: bool = False, flips: tuple[bool, ...] = (False, False)) -> tuple[Prompt, ...]:
        text = "" if empty else self._prompts[row]
        # Rows count from 1 in the ledger, as in messages.
        return tuple(
            Prompt(text, {"row": row + 1, "side": side} | ({"flipped": True} if flipped else {}))
            for side, flipped in zip(SIDES, flips, strict=True)
        )


class PreferenceImages(GivenImages):
    """The images of a preference file, by the metadata of `SamplePairs`."""

    def __init__(self, rows: PreferenceRows) -> None:
        self._rows = rows

    def pixels(self, prompts: tuple[Prompt, ...], size: tuple[int, int]) -> UInt8[np.ndarray, "B H W 3"]:
        images = []
        for about in (prompt.metadata for prompt in prompts):
            image = fitted(self._rows.image(about["row"] - 1, about["side"]), size)
            images.append(image[:, ::-1] if about.get("flipped") else image)
        return np.stack(images)
