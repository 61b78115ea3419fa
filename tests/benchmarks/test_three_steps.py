"""Parts of the three steps: voters agree with their taste, and the table is correct by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.small_copy import small_copy
from benchmarks.three_steps import RECIPE, SCORERS, VOTERS, rate, table, vote, warmth_of
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.aesthetic_head.agreement import spearman
from ray_ddpo.learner.aesthetic_head.table import read_table
from tests.rated_images import save_images, warmth


def test_votes_are_whole_follow_the_taste_and_depend_on_the_seed() -> None:
    tastes = np.random.default_rng(0).normal(size=300)
    votes = vote(tastes, 0)
    assert votes.shape == (300, 10) and (votes.sum(1) == VOTERS).all()
    means = votes @ np.arange(1, 11) / VOTERS
    assert 0.95 < (spearman(means, tastes) or 0) < 1
    assert np.array_equal(vote(tastes, 0), votes) and not np.array_equal(vote(tastes, 1), votes)


def test_the_command_reads_the_table_of_votes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in save_images(tmp_path, 30)]
    rate(paths, tmp_path / "ratings.csv", 0)
    images = read_table(tmp_path / "ratings.csv")
    tastes = np.array([warmth(np.asarray(Image.open(path))) for path in paths])
    assert images.paths == tuple(path.name for path in paths)
    assert (spearman(images.ratings, tastes) or 0) > 0.9


def test_the_recipe_accepts_scorers_and_head_as_overrides() -> None:
    overrides = ["--evaluation.scorers", SCORERS, "--reward.clip", "a/clip", "--reward.head", "a/head.safetensors"]
    recipe = build_components(Recipe.load(RECIPE, overrides)).recipe
    assert [scorer.name for scorer in recipe.evaluation.scorers] == ["function", "animal_classifier"]
    red, blue = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 51
    assert warmth_of(np.stack([red, blue]), ["a", "b"], [{}, {}]) == pytest.approx([1, -0.2])


def test_table_and_small_image_by_hand(tmp_path: Path) -> None:
    test = {"images": 40, "srcc": 0.8, "plcc": 0.7, "mse": 0.5, "mse_of_mean": 2.0}
    scorers = {"function": {"before": 0.05, "after": 0.2}, "animal_classifier": {"before": 0.9, "after": 0.8}}
    summary = {
        "images_compared": 135,
        "reward_before": 5.0,
        "reward_after": 6.5,
        "paired_standard_error": 0.1,
        "scorers": scorers,
    }
    lines = table(summary, {"splits": {"test": test}}, {"sampling": 60.4}).splitlines()
    assert lines[0] == "head: 40 test images, SRCC 0.800, PLCC 0.700, MSE 0.50 (of the mean 2.00)"
    assert "| rating by the head | 5.00 | 6.50 (+15.0 paired standard errors) |" in lines
    assert "| warmth, the true taste | 0.050 | 0.200 |" in lines and lines[-1].startswith("sampling 60 s; ")
    Image.new("RGB", (2000, 500)).save(tmp_path / "large.png")
    small_copy(tmp_path / "large.png", tmp_path / "small.png", 1000)
    assert Image.open(tmp_path / "small.png").size == (1000, 250)
