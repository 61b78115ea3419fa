"""All trackers as one: a tracker that fails during the run is left out, one that cannot start is an error."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trackers.jsonl import Jsonl
from ray_ddpo.common.trackers.media import Media
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker

ROUNDS: list[Metrics] = [{"round": float(round_index)} for round_index in range(3)]


class Book(LiveTracker):
    def __init__(self, fails_at: str, identity: str) -> None:
        self.calls: list[Any] = []
        self._fails_at = fails_at
        self._identity = identity

    def log(self, metrics: Metrics) -> None:
        self.calls.append(metrics["round"])
        if self._fails_at == f"round {metrics['round']:.0f}":
            raise OSError("the disk is full")

    def show(self, media: Media) -> None:
        self.calls.append(media)
        if self._fails_at == "show":
            raise ConnectionError("the service is down")

    def finish(self) -> None:
        self.calls.append("finish")
        if self._fails_at == "finish":
            raise RuntimeError("the service is down")

    def identity(self) -> str | None:
        return self._identity or None


class BookKeeper(Tracker):
    fails_at: str = ""
    identity: str = ""

    def start(self, run: RunInfo) -> Book:
        if self.fails_at == "start":
            raise ValueError("no such project")
        book = Book(self.fails_at, self.identity)
        BOOKS.append(book)
        return book


BOOKS: list[Book] = []


@pytest.fixture(autouse=True)
def empty_shelf() -> None:
    BOOKS.clear()


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo("run", tmp_path, {}, 3, 0)


def named(*trackers: Tracker) -> FanOut:
    return FanOut({f"book {number}": tracker for number, tracker in enumerate(trackers)})


def log_all(fan_out: FanOut, run: RunInfo) -> None:
    fan_out.start(run)
    for metrics in ROUNDS:
        fan_out.log(metrics)
    fan_out.finish()


def test_every_tracker_gets_every_round(run: RunInfo) -> None:
    log_all(named(BookKeeper(), BookKeeper()), run)
    assert [book.calls for book in BOOKS] == [[0, 1, 2, "finish"]] * 2


def test_a_tracker_that_breaks_is_reported_once_and_left_out_and_the_others_go_on(
    run: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    log_all(named(BookKeeper(fails_at="round 1"), BookKeeper()), run)
    broken, whole = BOOKS
    assert broken.calls == [0, 1] and whole.calls == [0, 1, 2, "finish"]
    assert capsys.readouterr().err == "tracker book 0 failed and is left out from here on: OSError: the disk is full\n"


def test_every_tracker_gets_media_and_one_that_fails_on_them_is_left_out(
    run: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    fan_out, media = named(BookKeeper(fails_at="show"), BookKeeper()), Media(0)
    fan_out.start(run)
    fan_out.show(media)
    fan_out.log(ROUNDS[0])
    broken, whole = BOOKS
    assert broken.calls == [media] and whole.calls == [media, 0]
    assert "tracker book 0 failed and is left out from here on: ConnectionError" in capsys.readouterr().err


def test_a_tracker_that_breaks_in_the_end_does_not_keep_the_others_open(
    run: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    log_all(named(BookKeeper(fails_at="finish"), BookKeeper()), run)
    assert BOOKS[1].calls[-1] == "finish"
    assert "RuntimeError: the service is down" in capsys.readouterr().err


def test_a_tracker_that_cannot_start_is_an_error_and_open_ones_are_closed(run: RunInfo) -> None:
    with pytest.raises(ValueError, match="no such project"):
        named(BookKeeper(), BookKeeper(fails_at="start")).start(run)
    assert [book.calls for book in BOOKS] == [["finish"]]


def test_an_interrupt_is_not_taken_for_a_broken_tracker(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Book, metrics: Metrics) -> None:
        raise KeyboardInterrupt

    fan_out = named(BookKeeper())
    fan_out.start(run)
    monkeypatch.setattr(Book, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fan_out.log(ROUNDS[0])


def test_media_are_needed_only_if_an_open_tracker_shows_them(run: RunInfo) -> None:
    numbers, images = named(Jsonl()), FanOut({"jsonl": Jsonl(), "book": BookKeeper(fails_at="show")})
    numbers.start(run)
    images.start(run)
    assert not numbers.shows and images.shows
    images.show(Media(0))  # it breaks, and is left out
    assert not images.shows


def test_a_trackers_identity_is_kept_even_if_it_fails_or_is_absent(
    run: RunInfo,
) -> None:
    fan_out = named(BookKeeper(identity="new", fails_at="round 0"), BookKeeper())
    log_all(fan_out, dataclasses.replace(run, tracker_ids={"book 0": "old", "a service": "kept"}))
    assert fan_out.identities() == {"book 0": "new", "a service": "kept"}
