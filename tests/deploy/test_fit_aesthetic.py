"""ddpo fit-aesthetic end to end on images with known ratings and a tiny CLIP, and its head as a reward."""

import csv
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from safetensors.torch import load_file

from ray_ddpo import cli
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.deploy.commands.fit_aesthetic.calibration import calibration_bins, calibration_chart
from tests.rated_images import save_images, write_csv, write_ratings
from tests.tiny_clip import save_tiny_clip

FILES = {
    "head.safetensors",
    "metrics.json",
    "calibration.png",
    "README.md",
    "broken.csv",
    "predictions.parquet",
    "embeddings",
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """400 images and their ratings."""
    folder = tmp_path_factory.mktemp("images")
    return folder, save_images(folder, 400)


@pytest.fixture
def table(rated: tuple[Path, dict[str, float]], tmp_path: Path) -> Path:
    return write_ratings(tmp_path / "ratings.csv", rated[1])


def fit(images: Path, table: Path, clip: Path, output: Path, *more: str) -> int:
    return cli.main(["fit-aesthetic", str(images), str(table), "--clip", str(clip), "--output", str(output), *more])


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("head", ["linear", "mlp", pytest.param("mlp-relu", marks=pytest.mark.thorough)])
def test_a_known_taste_is_recovered_on_images_that_were_not_fitted_on(
    rated: tuple[Path, dict[str, float]], table: Path, clip: Path, tmp_path: Path, head: str
) -> None:
    assert fit(rated[0], table, clip, tmp_path / "out", "--head", head, "--batch-size", "32", "--test", "0.2") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    figures = metrics(tmp_path / "out")
    test = figures["splits"]["test"]
    assert sum(split["images"] for split in figures["splits"].values()) == 400 and test["images"] > 60
    assert test["srcc"] > 0.9 and test["plcc"] > 0.9 and test["mse"] < 0.25 * test["mse_of_mean"]


def test_the_head_as_a_reward_by_its_path_gives_the_ratings_that_the_figures_are_of(
    rated: tuple[Path, dict[str, float]], table: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fit(rated[0], table, clip, tmp_path / "out", "--head", "mlp-relu", "--epochs", "5") == 0
    printed = capsys.readouterr().out
    recipe = tomllib.loads(printed[printed.index("[reward]") :])
    score = build(REWARDS, recipe["reward"], "reward").load("cpu")
    rows = parquet.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    for row in rows[:40]:
        pixels = np.asarray(Image.open(rated[0] / row["path"]))[None]
        assert score(pixels, ["any"], [{}])[0] == pytest.approx(row["predicted"], abs=1e-4)
        assert row["rating"] == pytest.approx(rated[1][row["path"]])
    test = [row for row in rows if row["split"] == "test"]
    mse = np.mean([(row["predicted"] - row["rating"]) ** 2 for row in test])
    assert metrics(tmp_path / "out")["splits"]["test"]["mse"] == pytest.approx(mse)


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bytes_and_another_a_different_head(
    rated: tuple[Path, dict[str, float]], table: Path, clip: Path, tmp_path: Path
) -> None:
    for name, seed in (("one", "5"), ("two", "5"), ("other", "6")):
        assert fit(rated[0], table, clip, tmp_path / name, "--head", "mlp", "--epochs", "3", "--seed", seed) == 0
    for name in FILES - {"embeddings"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    one, other = (load_file(tmp_path / name / "head.safetensors")["layers.0.weight"] for name in ("one", "other"))
    assert not np.array_equal(one, other)


def test_broken_images_are_listed_counted_and_left_out(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ratings = save_images(tmp_path / "images", 60)
    (tmp_path / "images" / "0-0003.png").write_bytes(b"no image")
    table = write_ratings(tmp_path / "ratings.csv", {**ratings, "absent.png": 4.0})
    assert fit(tmp_path / "images", table, clip, tmp_path / "out", "--validation", "0.3") == 0
    with (tmp_path / "out" / "broken.csv").open() as file:
        broken = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(broken) == {"0-0003.png", "absent.png"} and broken["absent.png"] == "it is not in the folder"
    assert "broken images: 2, listed in" in capsys.readouterr().out
    figures = metrics(tmp_path / "out")
    assert (figures["images"], figures["broken"]) == (59, 2)
    assert "2 more were broken" in (tmp_path / "out" / "README.md").read_text()


def test_ava_with_its_official_list(clip: Path, tmp_path: Path) -> None:
    """Votes of 20 people each; ids in AVA.txt, and the list of the test images by id."""
    ratings = save_images(tmp_path / "sampled", 60)
    generator, lines, ids = np.random.default_rng(0), [], []
    (tmp_path / "images").mkdir()
    for number, (name, rating) in enumerate(ratings.items()):
        ids.append(str(900_000 + number))
        Image.open(tmp_path / "sampled" / name).save(tmp_path / "images" / f"{ids[-1]}.jpg", quality=95)
        votes = np.bincount(generator.normal(rating, 1, 20).round().clip(1, 10).astype(int), minlength=11)[1:]
        lines.append(" ".join(map(str, (number + 1, ids[-1], *votes, 0, 0, 1396))))
    (tmp_path / "AVA.txt").write_text("\n".join(lines))
    (tmp_path / "official.txt").write_text("\n".join(ids[:20]))
    more = ("--split-file", str(tmp_path / "official.txt"), "--validation", "0.2")
    assert fit(tmp_path / "images", tmp_path / "AVA.txt", clip, tmp_path / "out", *more) == 0
    rows = parquet.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert [row["path"] for row in rows if row["split"] == "test"] == [f"{number}.jpg" for number in ids[:20]]
    votes = [int(count) for count in lines[7].split()[2:12]]
    assert rows[7]["rating"] == pytest.approx(np.dot(votes, range(1, 11)) / 20)
    assert metrics(tmp_path / "out")["splits"]["test"]["srcc"] > 0.6


def test_added_images_are_embedded_and_move_no_other_image_between_splits(clip: Path, tmp_path: Path) -> None:
    ratings = save_images(tmp_path / "images", 80)
    few = dict(list(ratings.items())[20:])
    splits = []
    for chosen in (few, ratings):
        table = write_ratings(tmp_path / "ratings.csv", chosen)
        assert fit(tmp_path / "images", table, clip, tmp_path / "out", "--validation", "0.2") == 0
        rows = parquet.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
        splits.append({row["path"]: row["split"] for row in rows})
    assert len(splits[1]) == 80 and all(splits[1][path] == split for path, split in splits[0].items())
    parts = [parquet.read_table(path) for path in sorted((tmp_path / "out" / "embeddings").iterdir())]
    assert [len(part) for part in parts] == [60, 20]


def test_another_clip_or_precision_is_refused_and_leaves_the_embeddings(
    rated: tuple[Path, dict[str, float]], table: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert fit(rated[0], table, clip, tmp_path / "out") == 0
    before = (tmp_path / "out" / "embeddings" / "part-000000.parquet").read_bytes()
    other = save_tiny_clip(tmp_path / "other", seed=1)
    for changed, more in ((other, ()), (clip, ("--dtype", "bfloat16"))):
        capsys.readouterr()
        assert fit(rated[0], table, changed, tmp_path / "out", *more) == 2
        assert "has other weights or another precision: take another --output" in capsys.readouterr().err
    assert (tmp_path / "out" / "embeddings" / "part-000000.parquet").read_bytes() == before


def test_what_is_wrong_with_the_command_is_said_before_anything_is_loaded(
    tmp_path: Path, rated: tuple[Path, dict[str, float]], table: Path, capsys: pytest.CaptureFixture
) -> None:
    wrong = write_csv(tmp_path / "wrong.csv", {"path": ["a"], "score": [1]})
    nowhere, output = tmp_path / "nowhere", tmp_path / "out"
    for images, given, more, message in (
        (nowhere, table, (), "the folder of images .*nowhere is not there"),
        (rated[0], wrong, (), r"has the columns \['path', 'score'\]: it needs path, and one of rating"),
        (rated[0], table, ("--validation", "1.5"), "the shares of validation and test are 1.5 and 0.1"),
        (rated[0], table, ("--epochs", "0"), "--epochs is 0: it must be 1 or more"),
        (
            rated[0],
            table,
            ("--output", "s3://bucket/x"),
            "--output is 's3://bucket/x': it must be a folder of this machine",
        ),
    ):
        assert fit(images, given, nowhere, output, *more) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


def test_the_model_card_says_what_the_metrics_say(
    rated: tuple[Path, dict[str, float]], table: Path, clip: Path, tmp_path: Path
) -> None:
    assert fit(rated[0], table, clip, tmp_path / "out", "--seed", "7") == 0
    card, figures = (tmp_path / "out" / "README.md").read_text(), metrics(tmp_path / "out")
    assert card.startswith("---\nlicense: # fill in") and f"| seed | {figures['seed']} |" in card
    test = figures["splits"]["test"]
    cells = (str(test["images"]), *(f"{test[name]:.4f}" for name in ("mse", "mse_of_mean", "srcc", "plcc")))
    assert f"| test | {' | '.join(cells)} |" in card
    assert figures["clip_fingerprint"] in card and figures["versions"]["torch"] in card


def test_the_bins_of_the_calibration_by_hand() -> None:
    predicted = np.array([float(number) for number in range(16)])[::-1]
    true = np.array([2.0, 4.0] * 8)
    predicted_means, true_means, errors = calibration_bins(predicted, true)
    assert predicted_means.tolist() == [3.5, 11.5] and true_means.tolist() == [3, 3]
    # Deviation √(8/7) of eight, over √8.
    assert errors == pytest.approx([7**-0.5] * 2)


def test_the_calibration_chart_shows_its_images() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(5, 1, 300)
    good, bad = (calibration_chart(true + generator.normal(0, noise, 300), true, "test") for noise in (0.1, 2.0))
    assert good.startswith(b"\x89PNG") and len(good) > 10_000 and good != bad
    assert calibration_chart(np.array([3.0, 3.0]), np.array([3.0, 3.0]), "validation").startswith(b"\x89PNG")
