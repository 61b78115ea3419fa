"""The evaluation log: what is written comes back, a version that a kill cut off is not there, and NaN is null."""

import json
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.evaluation.eval_log import ENTRIES, EvalLog
from ray_ddpo.deploy.evaluation.eval_result import EvalResult


def images(seed: int, count: int = 3) -> EvalResult:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
    scores = {"reward": generator.normal(size=count), "beauty": np.array([1.0, np.nan, 3.0])}
    return EvalResult(tuple(Prompt(f"prompt {image}") for image in range(count)), (5, 6, 2**62), scores, pixels)


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{request.getfixturevalue('bucket')}/run" if request.param == "s3" else tmp_path)


def test_scores_and_the_first_images_come_back(storage: Storage) -> None:
    log, current = EvalLog(storage), images(0)
    log.write({"policy_version": 4, "x": float("nan")}, {"current": current, "average": images(1)}, num_pixels=2)
    assert log.entries() == [{"policy_version": 4, "x": None}]
    scores = log.scores(4)
    assert np.array_equal(scores["reward"], current.scores["reward"])
    assert np.array_equal(scores["beauty"], current.scores["beauty"], equal_nan=True)
    assert all(np.array_equal(*pair) for pair in zip(log.images(4), current.pixels[:2], strict=True))
    table = log.read(4)
    assert table["variant"].to_pylist() == ["current"] * 3 + ["average"] * 3
    assert table["prompt"].to_pylist()[:3] == ["prompt 0", "prompt 1", "prompt 2"]
    assert table["seed"].to_pylist()[:3] == [5, 6, 2**62]


def test_versions_that_are_not_kept_are_gone(storage: Storage) -> None:
    log = EvalLog(storage)
    for version in (0, 2, 4):
        log.write({"policy_version": version}, {"current": images(version)}, num_pixels=0)
    log.keep([{"policy_version": 0}, {"policy_version": 2}])
    assert [each["policy_version"] for each in log.entries()] == [0, 2]
    assert np.array_equal(log.scores(2)["reward"], images(2).scores["reward"])
    with pytest.raises(FileNotFoundError):
        log.read(4)


def test_a_line_without_its_end_is_not_there(tmp_path: Path) -> None:
    log = EvalLog(Storage(tmp_path))
    assert log.entries() == []
    (tmp_path / ENTRIES).write_text(json.dumps({"policy_version": 0}) + '\n{"policy_version": 2')
    assert log.entries() == [{"policy_version": 0}]
