"""AnswerCache: remember a model's answers by image, question and model; in memory, or in a file that runs share."""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_ddpo.actors.rewards.judging.answers import ChatAnswer
from ray_ddpo.actors.rewards.service_client import RewardServiceFailed

FILE = "answers.sqlite3"
WAIT_SECONDS = 60.0  # for another process that writes
PRUNED = 0.1  # share of the answers that is removed at once when there are too many
TABLE = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, used INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON answers (used);
"""


class AnswerCache:
    """The last `size` answers. Several processes of one machine may share a folder."""

    def __init__(self, folder: str | None, size: int) -> None:
        """Open the cache.

        Args:
            folder: where the file is, which is created if it is missing. None: in memory.
            size: most answers that are kept. The least recently used ones are removed.

        Raises:
            ValueError: the folder cannot be written, or its file is no cache.
        """
        self._size = size
        self._folder = folder
        self._lock = threading.Lock()
        path = Path(os.path.expanduser(folder)) if folder else None
        try:
            if path:
                path.mkdir(parents=True, exist_ok=True)
            where = path / FILE if path else ":memory:"
            self._database = sqlite3.connect(where, timeout=WAIT_SECONDS, check_same_thread=False, isolation_level=None)
            if path:
                self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"cache_folder is {folder!r}, whose file {FILE} cannot be used ({error}): it must be a folder of a "
                "local disk that can be written, and the file must be of this cache"
            ) from error

    @contextmanager
    def _database_alone(self) -> Iterator[None]:
        """Let one thread use the database.

        Raises:
            RewardServiceFailed: another process has locked the file for too long, or the disk is full. A retry may succeed.
        """
        with self._lock:
            try:
                yield
            except sqlite3.OperationalError as error:
                raise RewardServiceFailed(
                    f"the cache of answers in {self._folder!r} does not answer: {error}"
                ) from error

    def get(self, key: str) -> ChatAnswer | None:
        """Return the answer, and mark it as used; None if it is unknown."""
        with self._database_alone():
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            self._database.execute(
                "UPDATE answers SET used = (SELECT MAX(used) + 1 FROM answers) WHERE key = ?", (key,)
            )
        stored = json.loads(row[0])
        return ChatAnswer(stored["text"], tuple((token, log_prob) for token, log_prob in stored["first_token"]))

    def put(self, key: str, answer: ChatAnswer) -> None:
        """Keep an answer, and remove the least recently used ones if there are too many."""
        stored = json.dumps({"text": answer.text, "first_token": answer.first_token})
        with self._database_alone():
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, (SELECT IFNULL(MAX(used), 0) + 1 FROM answers))",
                (key, stored),
            )
            (count,) = self._database.execute("SELECT COUNT(*) FROM answers").fetchone()
            if count > self._size:
                surplus = max(count - self._size, int(PRUNED * self._size))
                self._database.execute(
                    "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used LIMIT ?)", (surplus,)
                )
