"""Divide rated images into train, validation and test."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ray_ddpo.learner.aesthetic_head.table import SPLITS, RatedImages

FEWEST = {"train": 2, "validation": 2, "test": 0}


@dataclass(frozen=True)
class SplitPlan:
    """How to divide images if their table has no splits."""

    seed: int = 0
    validation: int | float = 0.1  # fraction of the images that are not in `test_list`
    test: int | float = 0.1  # fraction; not used with `test_list`
    test_list: Path | None = None  # one image a line: path, file name, or file name without suffix


def hash_fraction(path: str, seed: int) -> float:
    """Return a number in 0 … 1 that depends on path and seed only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest(), "big") / 2**64


def split_by_hash(paths: Sequence[str], seed: int, validation: int | float, test: int | float) -> tuple[str, ...]:
    """Return each path's split, which does not change when other images are added or removed."""
    fractions = [hash_fraction(path, seed) for path in paths]
    return tuple(
        "test" if fraction < test else "validation" if fraction < test + validation else "train"
        for fraction in fractions
    )


def assign_splits(images: RatedImages, plan: SplitPlan) -> tuple[str, ...]:
    """Return the table's splits, else those by the list of test images, else by hash.

    Raises:
        ValueError: table and list both define splits, the list names none of the images, or a fraction is out of range.
    """
    if images.splits is not None:
        if plan.test_list is not None:
            raise ValueError(f"the table has a column split, and {plan.test_list} is a second answer: give one of them")
        return images.splits
    if not (0 < plan.validation < 1 and 0 <= plan.test < 1 and plan.validation + plan.test < 1):
        raise ValueError(
            f"the shares of validation and test are {plan.validation} and {plan.test}: validation must be over 0, "
            "test 0 or more, and their sum below 1"
        )
    if plan.test_list is None:
        return split_by_hash(images.paths, plan.seed, plan.validation, plan.test)
    listed = _names_in(plan.test_list)
    others = split_by_hash(images.paths, plan.seed, plan.validation, 0)
    splits = tuple(
        "test" if _names_of(path) & listed else split for path, split in zip(images.paths, others, strict=True)
    )
    if "test" not in splits:
        raise ValueError(
            f"{plan.test_list} names none of the table's images: its lines must be paths such as {images.paths[0]!r}, "
            f"or ids such as {PurePosixPath(images.paths[0]).stem!r}; its first is {min(listed, default='missing')!r}"
        )
    return splits


def check_sizes(splits: Sequence[str]) -> None:
    """Check the sizes of the splits.

    Raises:
        ValueError: train or validation has too few images.
    """
    counts = {split: splits.count(split) for split in SPLITS}
    if any(counts[split] < fewest for split, fewest in FEWEST.items()):
        listed = ", ".join(f"{count} {split}" for split, count in counts.items())
        raise ValueError(f"the images are {listed}: two or more must be for train, and two or more for validation")


def _names_of(path: str) -> set[str]:
    return {path, PurePosixPath(path).name, PurePosixPath(path).stem}


def _names_in(file: Path) -> set[str]:
    if not file.is_file():
        raise ValueError(f"the list of test images {file} is not there: give a file with a line an image")
    return {line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
