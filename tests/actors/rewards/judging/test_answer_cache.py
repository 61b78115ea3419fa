"""Answers are remembered in memory or in a file, bounded, by several processes at once."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ddpo.actors.rewards.judging import answer_cache
from ray_ddpo.actors.rewards.judging.answer_cache import FILE, AnswerCache
from ray_ddpo.actors.rewards.judging.answers import ChatAnswer
from ray_ddpo.actors.rewards.service_client import RewardServiceFailed

ANSWER = ChatAnswer("Yes, a “cat”", (("Yes", -0.25), ("No", -1.5)))
ROOT = Path(__file__).parents[4]
WRITE = """
import sys
from ray_ddpo.actors.rewards.judging.answer_cache import AnswerCache
from ray_ddpo.actors.rewards.judging.answers import ChatAnswer
cache = AnswerCache(sys.argv[1], 1000)
for number in range(100):
    cache.put(f"{sys.argv[2]} {number}", ChatAnswer(str(number)))
"""


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    for folder in (None, str(tmp_path / "new" / "folder")):
        cache = AnswerCache(folder, 10)
        assert cache.get("a") is None
        cache.put("a", ANSWER)
        assert cache.get("a") == ANSWER
    assert AnswerCache(str(tmp_path / "new" / "folder"), 10).get("a") == ANSWER


def test_the_least_recently_used_answers_are_removed() -> None:
    cache = AnswerCache(None, 3)
    for key in "abc":
        cache.put(key, ChatAnswer(key))
    assert cache.get("a")
    cache.put("d", ChatAnswer("d"))
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("one", "two")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    cache = AnswerCache(str(tmp_path), 1000)
    assert all(
        cache.get(f"{name} {number}") == ChatAnswer(str(number)) for name in ("one", "two") for number in (0, 99)
    )


def test_a_file_that_is_no_cache_and_a_folder_that_is_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("something else, that is long enough to be no database" * 100)
    for folder in (tmp_path, tmp_path / FILE):
        with pytest.raises(ValueError, match=f"cache_folder is '{folder}'"):
            AnswerCache(str(folder), 10)


def test_a_locked_file_fails_the_image_and_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_cache, "WAIT_SECONDS", 0.05)
    cache = AnswerCache(str(tmp_path), size=10)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RewardServiceFailed, match=f"the cache of answers in '{tmp_path}' does not answer: .*locked"):
        cache.put("key", ChatAnswer("5"))
    other.execute("ROLLBACK")
    cache.put("key", ChatAnswer("5"))
    assert cache.get("key") == ChatAnswer("5")
