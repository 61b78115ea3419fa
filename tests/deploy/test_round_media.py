"""Media of a round, by hand and in a run, where they change no bits."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import ImageBatch, Rollout, Scores, TaskReport, TrainBatch
from ray_ddpo.deploy.driver.round_media import first_images, round_media
from tests.shown_rounds import fingerprint, run, shown_in

CAT, DOG = Prompt("cat"), Prompt("dog")


def rollout(index: int, prompts: tuple[Prompt, ...], rewards: list[float]) -> Rollout:
    seeds = tuple(range(10 * index, 10 * index + len(prompts)))
    report = TaskReport(Task(3, index, 3, prompts, seeds), "f", 1, 0, 0.0)
    pixels = np.array(seeds, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return Rollout(report, Scores({"beauty": np.array(rewards)}, 0.0), None, ImageBatch(pixels, prompts))


ROUND = [
    rollout(0, (CAT, CAT), [1.0, 2.0]),
    rollout(1, (DOG, DOG), [4.0, np.nan]),
    rollout(2, (CAT, DOG), [3.0, 6.0]),
]
BATCH = TrainBatch(3, tuple(each.report for each in ROUND), np.array([-2.0, 0.0, -1.0, np.nan, 2.0, 1.0]), dropped=(3,))


def test_prompts_captions_and_histograms_leave_dropped_images_out() -> None:
    images = first_images(ROUND, 4, lambda each: each.images)
    shown = round_media(BATCH, ROUND, {"beauty": 2.0}, images, np.array([0.0, 0.5]))
    assert shown.round == 3 and shown.tables["round"].columns[:2] == ("prompt", "images")
    cat, dog = shown.tables["round"].rows
    assert cat == pytest.approx(("cat", 3, 4.0, np.std([2, 4, 6]), 0.0, np.std([-2, 0, 2])))
    assert dog == pytest.approx(("dog", 2, 10.0, 2.0, 0.0, 1.0))
    captions = [image.caption for image in shown.images["round"]]
    assert captions[0] == "cat: reward 2, advantage -2" and captions[3] == "dog: dropped"
    assert [image.pixels.max() for image in shown.images["round"]] == [0, 1, 10, 11]
    assert shown.histograms["reward"].tolist() == [2, 4, 8, 6, 12]
    assert shown.histograms["advantage"].tolist() == [-2, 0, -1, 2, 1]
    assert shown.histograms["log_ratio"].tolist() == [0, 0.5] and set(shown.histograms) == {
        "reward",
        "advantage",
        "log_ratio",
    }


def test_only_shown_images_are_fetched_and_lost_images_are_left_out() -> None:
    fetched = []

    def fetch(each: Rollout) -> ImageBatch | None:
        fetched.append(each.report.task.index)
        return None if each.report.task.index == 0 else each.images

    found = first_images(ROUND, 3, fetch)
    assert fetched == [0, 1] and {image: shown.pixels.max() for image, shown in found.items()} == {2: 10}
    assert first_images(ROUND, 0, fetch) == {} and fetched == [0, 1]
    captions = round_media(BATCH, ROUND, {"beauty": 1.0}, found, np.empty(0)).images["round"]
    assert [image.caption for image in captions] == ["dog: reward 4, advantage -1"]
    assert round_media(BATCH, ROUND, {"beauty": 1.0}, {}, np.empty(0)).images == {}


def test_several_rewards_have_a_distribution_each() -> None:
    shown = round_media(BATCH, ROUND, {"beauty": 1.0}, {}, np.empty(0))
    assert "reward/beauty" not in shown.histograms
    two = [Rollout(each.report, Scores({**each.scores.rewards, "size": np.ones(2)}, 0.0), None, None) for each in ROUND]
    shown = round_media(BATCH, two, {"beauty": 1.0, "size": 0.5}, {}, np.empty(0))
    assert shown.histograms["reward"].tolist() == [1.5, 2.5, 4.5, 3.5, 6.5]
    assert shown.histograms["reward/size"].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.thorough
def test_a_run_shows_the_images_of_its_ledger_and_keeps_its_bits(tables: dict) -> None:
    tables["learner"]["parts_per_round"] = 2
    shown, blind = run(tables, "shown", True), run(tables, "blind", True, media={"every": 0})
    assert fingerprint(shown) == fingerprint(blind)
    images = shown_in(shown)
    log_ratios = images.pop("log_ratios")
    ledger = Ledger(RunFolder(shown.run_path()).storage, shown.rollouts)
    expected = {
        (round_index, image): from_png(data).tobytes()
        for round_index in (0, 2, 3)
        for image, data in enumerate(ledger.read(round_index)["pixels"].to_pylist()[:5])
    }
    assert images == expected and len(images) == 15
    assert {round_index: count for round_index, (count, _) in log_ratios.items()} == {
        0: 32,
        2: 32,
        3: 32,
    }  # 8 images of 4 steps
    assert not list(Path(blind.run_path()).glob("tensorboard/*/*"))
