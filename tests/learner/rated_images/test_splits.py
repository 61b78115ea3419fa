"""Splits: an image keeps its own when others come, an official list is kept to, and wrong shares are refused."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.learner.aesthetic_head.splits import SplitPlan, assign_splits, check_sizes, split_by_hash
from ray_ddpo.learner.aesthetic_head.table import RatedImages

PATHS = tuple(f"{number}.jpg" for number in range(5000))


def images(paths: tuple[str, ...] = PATHS, splits: tuple[str, ...] | None = None) -> RatedImages:
    return RatedImages(paths, np.zeros(len(paths)), splits)


def test_added_and_removed_pictures_move_no_other() -> None:
    few = dict(zip(PATHS[1000:2000], assign_splits(images(PATHS[1000:2000]), SplitPlan()), strict=True))
    many = dict(zip(PATHS, assign_splits(images(), SplitPlan()), strict=True))
    turned = dict(zip(PATHS[::-1], assign_splits(images(PATHS[::-1]), SplitPlan()), strict=True))
    assert many == turned and all(many[path] == split for path, split in few.items())


def test_shares_are_kept_and_another_seed_divides_otherwise() -> None:
    splits = split_by_hash(PATHS, 0, 0.1, 0.2)
    # Deviations of binomial counts of 5000: 21 and 28.
    assert splits.count("validation") == pytest.approx(500, abs=85)
    assert splits.count("test") == pytest.approx(1000, abs=113)
    assert splits != split_by_hash(PATHS, 1, 0.1, 0.2)


def test_a_larger_validation_share_keeps_the_test_pictures() -> None:
    small, large = split_by_hash(PATHS, 0, 0.1, 0.1), split_by_hash(PATHS, 0, 0.4, 0.1)
    assert [split == "test" for split in small] == [split == "test" for split in large]
    assert all(after == "validation" for before, after in zip(small, large, strict=True) if before == "validation")


@pytest.mark.parametrize("line", ["{}.jpg", "{}"], ids=["paths", "ids"])
def test_the_official_list_is_the_test_set(tmp_path: Path, line: str) -> None:
    (tmp_path / "test.txt").write_text("\n".join(line.format(number) for number in range(0, 5000, 50)) + "\n\n")
    splits = assign_splits(images(), SplitPlan(test_list=tmp_path / "test.txt"))
    assert [number for number, split in enumerate(splits) if split == "test"] == list(range(0, 5000, 50))
    assert splits.count("validation") == pytest.approx(490, abs=85)


def test_a_list_of_other_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("x1\nx2\n")
    with pytest.raises(
        ValueError, match="names none of the table's images: .*such as '0.jpg', or ids such as '0'; .*'x1'"
    ):
        assign_splits(images(), SplitPlan(test_list=tmp_path / "test.txt"))
    with pytest.raises(ValueError, match="nowhere is not there"):
        assign_splits(images(), SplitPlan(test_list=tmp_path / "nowhere"))


def test_the_tables_own_splits_are_taken_and_no_list_beside_them(tmp_path: Path) -> None:
    own = ("test",) * 4999 + ("train",)
    assert assign_splits(images(splits=own), SplitPlan()) == own
    with pytest.raises(ValueError, match="the table has a column split, and .* is a second answer"):
        assign_splits(images(splits=own), SplitPlan(test_list=tmp_path / "test.txt"))


@pytest.mark.parametrize(("validation", "test"), [(0, 0.1), (0.1, -0.1), (0.5, 0.5), (1, 0)])
def test_shares_out_of_range_are_refused(validation: float, test: float) -> None:
    with pytest.raises(ValueError, match=f"validation and test are {validation} and {test}: validation must be over 0"):
        assign_splits(images(), SplitPlan(validation=validation, test=test))


def test_too_few_pictures_to_choose_by_are_refused_with_the_counts() -> None:
    check_sizes(("train", "train", "validation", "validation"))
    with pytest.raises(ValueError, match="are 3 train, 1 validation, 2 test: two or more must be for train"):
        check_sizes(("train",) * 3 + ("validation",) + ("test",) * 2)
