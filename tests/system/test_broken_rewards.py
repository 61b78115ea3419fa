"""Broken rewards through the command line: exit code, message, and an end within seconds."""

import time
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from tests import faulty_rewards
from tests.failure_page import assert_documented

FAULTS, USERS = "tests.faulty_rewards", "tests.user_functions"
LONGEST_SECONDS = 240.0  # a few on an idle machine


def ended(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, path: str, *options: str
) -> tuple[int, str, float]:
    """Train with a function as the reward; the exit code, all that was printed, and the seconds that it took."""
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(without_none({**tables, "reward": {"name": "function", "path": path}})))
    start = time.monotonic()
    exit_code = cli.main(["train", str(file), *options])
    seconds = time.monotonic() - start
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err, seconds


def test_a_reward_that_raises_for_every_image_ends_the_run_at_once(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    exit_code, printed, seconds = ended(tables, tmp_path, capfd, f"{FAULTS}:raises_always", "--serial")
    assert_documented("a reward raises for every image, from the start", exit_code, printed)
    assert "AttributeError: 'str' object has no attribute 'no_such_method' at " in printed
    assert "tests/faulty_rewards.py:" in printed and "in raises_always" in printed
    assert seconds < LONGEST_SECONDS


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("function", "situation"),
    [
        ("raises_for_one_prompt", "a reward raises for some images"),
        ("nan_for_one_prompt", "a reward gives NaN or infinity for some images"),
    ],
)
def test_images_that_a_reward_cannot_score_are_dropped_by_name(
    function: str, situation: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    prompts = {"name": "texts", "texts": ["cat", "dog", "bee", "ant"]}
    tables |= {"prompts": prompts, "rounds": 1, "sampling": {**tables["sampling"], "num_steps": 2}}
    exit_code, printed, _ = ended(tables, tmp_path, capfd, f"{FAULTS}:{function}", "--serial")
    assert_documented(situation, exit_code, printed)
    assert "prompt 'cat') is dropped" in printed and printed.count("is dropped") < 8


@pytest.mark.system
def test_a_reward_that_breaks_later_ends_the_run_so_that_it_can_go_on(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = f"{FAULTS}:raises_from_the_second_round"
    faulty_rewards._calls.clear()
    exit_code, printed, _ = ended(tables, tmp_path, capfd, path, "--serial")
    assert_documented("a reward raises for every image, after it has scored some", exit_code, printed)
    assert "RuntimeError: the licence has expired" in printed and "round 1/2" in printed
    faulty_rewards._calls.clear()  # it is mended
    exit_code, printed, _ = ended(tables, tmp_path, capfd, path, "--serial", "--resume", "auto")
    assert exit_code == 0 and "round 2/2" in printed and "round 1/2" not in printed


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize(
    ("path", "situation"),
    [
        (f"{USERS}:two_parameters", "a reward function takes other parameters"),
        (f"{USERS}:not_awaited", "a reward function is async"),
        (f"{USERS}:yields", "a reward function yields its scores"),
        (f"{USERS}:Scorer", "`reward.path` names a class"),
        (f"{USERS}:NOT_A_FUNCTION", "`reward.path` names something that cannot be called"),
        (f"{USERS}:one_number_for_all", "a reward returns something else than one number an image"),
        pytest.param(
            f"{USERS}:nothing_returned",
            "a reward returns something else than one number an image",
            marks=pytest.mark.system,
        ),
        pytest.param(f"{FAULTS}:writes_into_images", "a reward writes into `images`", marks=pytest.mark.system),
    ],
)
def test_a_reward_that_does_not_keep_to_the_contract_is_refused(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, path: str, situation: str
) -> None:
    exit_code, printed, _ = ended(tables, tmp_path, capfd, path, "--serial")
    assert_documented(situation, exit_code, printed)
    assert path in printed or "writes_into_images" in printed


@pytest.mark.system
def test_on_ray_a_broken_reward_ends_the_run_as_in_one_process(
    tables: dict, tmp_path: Path, cluster: None, capfd: pytest.CaptureFixture
) -> None:
    exit_code, printed, seconds = ended(tables, tmp_path, capfd, f"{FAULTS}:raises_always", "--name", "always")
    assert_documented("a reward raises for every image, from the start", exit_code, printed)
    assert "tests/faulty_rewards.py:" in printed and seconds < LONGEST_SECONDS
    assert "ray::" not in printed and "ScoringFailed" not in printed
    path = f"{FAULTS}:raises_from_the_second_round"
    exit_code, printed, seconds = ended(tables, tmp_path, capfd, path, "--name", "later")
    assert_documented("a reward raises for every image, after it has scored some", exit_code, printed)
    assert seconds < LONGEST_SECONDS
    exit_code, printed, _ = ended(tables, tmp_path, capfd, f"{FAULTS}:writes_into_images", "--name", "writes")
    assert_documented("a reward writes into `images`", exit_code, printed)


@pytest.mark.system
def test_equal_rewards_are_reported_and_leave_the_weights_as_they_are(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    exit_code, printed, _ = ended(tables, tmp_path, capfd, f"{FAULTS}:constant", "--serial")
    assert_documented("all rewards of a group are equal", exit_code, printed)


@pytest.mark.system
def test_a_reward_that_collapses_is_reported_in_its_round_and_at_the_end(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path, options = f"{FAULTS}:collapses", ("--serial", "--rounds", "4", "--sampling.num_steps", "2")
    exit_code, printed, _ = ended(tables, tmp_path, capfd, path, *options)
    assert_documented("the reward collapses", exit_code, printed)
    assert "the reward collapsed in round 3: " in printed and "learner.learning_rate = 0.001" in printed
    assert "and has not come back: it ends at -9" in printed and "idle" not in printed
