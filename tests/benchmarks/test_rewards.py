"""The benchmark of rewards: rates by hand, and its cases are registered rewards."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import rewards
from benchmarks.rewards import CLIPS, LIGHT, Case, cases, interleaved, table
from ray_ddpo.actors.rewards import REWARDS


def unused(*_: object) -> np.ndarray:
    raise AssertionError("not to be called")


def test_a_rate_is_the_batch_over_the_seconds() -> None:
    measured = [
        (Case("a", 64, 16, unused), 0.5),
        (Case("a", 512, 16, unused), 8.0),
        (Case("b", 512, 4000, unused), 1.0),
    ]
    assert list(table(measured))[2:] == ["| `a` | 32 | 2 |", "| `b` | – | 4,000 |"]


def test_the_first_turn_is_a_warm_up_and_the_others_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0, 1.0, 20.0, 3.0, 40.0, 2.0, 30.0])
    monkeypatch.setattr(rewards, "seconds", lambda run: (run(), next(clock))[1])
    called: list[str] = []
    assert interleaved([lambda: called.append("a"), lambda: called.append("b")], repeats=3) == [2, 30]
    assert called == ["a", "b"] * 4


def test_measured_rewards_are_registered_and_run(tmp_path: Path) -> None:
    assert set(LIGHT + CLIPS) <= set(REWARDS)
    found = list(cases(["brightness"], tmp_path))
    assert [(case.side, case.batch) for case in found] == [(64, 16), (512, 16)]
    found[0].run()
