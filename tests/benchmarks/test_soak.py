"""A soak's losses and its fit of memory, by hand."""

from pathlib import Path

import pytest

from benchmarks.memory import Event, Sample, chart, growths
from benchmarks.soak import losses


@pytest.mark.parametrize(
    ("logged", "fingerprint", "words"),
    [
        ([0, 1, 2], "aa", []),
        ([0, 2], "aa", ["lacks the rounds [1]"]),
        ([0, 1, 1, 2], "aa", ["has the rounds [1] more than once"]),
        ([0, 2, 1], "aa", ["metrics.jsonl"]),
        ([0, 1, 2], "bb", ["the weights are aa"]),
    ],
)
def test_losses_are_found(logged: list[int], fingerprint: str, words: list[str]) -> None:
    found = losses(3, logged, ("aa", fingerprint))
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


def growing(role: str, pid: int, start: float, minutes: int, a_minute: float) -> list[Sample]:
    """Return samples of a process that grows by 100 MB in its first seconds, as libraries load, and then linearly."""
    seconds = [float(second) for second in range(60 * minutes + 1)]
    loaded = [100.0 if second > 5 else 0.0 for second in seconds]
    private = [50 + jump + a_minute * second / 60 for second, jump in zip(seconds, loaded, strict=True)]
    return [Sample(role, pid, start + second, 20 + 2 * mb, mb) for second, mb in zip(seconds, private, strict=True)]


def test_each_settled_process_gets_a_least_squares_line() -> None:
    samples = growing("driver", 1, 0, 10, 3.0) + growing("learner", 2, 0, 10, 0.0) + growing("driver", 3, 700, 5, -1.0)
    first, learner, second = growths(samples)
    assert (first.role, first.pid, second.role, second.pid) == ("driver", 1, "driver", 3)
    assert (first.first, first.last) == (120, 600)  # a fifth of ten minutes
    assert (first.private, first.resident) == (pytest.approx(3.0), pytest.approx(6.0))
    assert learner.private == pytest.approx(0, abs=1e-9) and second.private == pytest.approx(-1.0)
    assert first.offset == pytest.approx(150)


def test_a_short_lived_process_gets_no_line() -> None:
    assert growths([Sample("driver", 1, float(second), 1, 1) for second in range(10)]) == []


def test_the_chart_is_written(tmp_path: Path) -> None:
    events = [Event("killed", 30, "worker 9"), Event("scaled", 60, "{}"), Event("driver", 90, "SIGKILL")]
    chart(tmp_path / "soak.png", "a soak", growing("driver", 1, 0, 2, 1) + growing("learner", 2, 0, 2, 0), events)
    assert (tmp_path / "soak.png").stat().st_size > 10_000
