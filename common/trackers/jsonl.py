"""Metrics as `metrics.jsonl` in the run's folder: one JSON object per round, written as soon as the round ends."""

import json
import math

from ray_ddpo.common.run_storage.reading import read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage, Unwritten
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker


class JsonlFile(LiveTracker):
    """The open file. Rounds that a resumed run does again are removed first."""

    def __init__(self, storage: Storage, name: str, first_round: int) -> None:
        self._storage = storage
        self._name = name
        self._unwritten = Unwritten()
        _cut(storage, name, first_round)

    def log(self, metrics: Metrics) -> None:
        # JSON has no NaN and no infinity, and readers other than Python's would fail.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._unwritten.append(self._storage, self._name, (json.dumps(finite) + "\n").encode())

    def flush(self) -> None:
        self._unwritten.flush()

    def finish(self) -> None:
        self._unwritten.flush()


class Jsonl(Tracker):
    """Metrics as a JSON object per round in `metrics.jsonl` of the run's folder. It has no keys."""

    def start(self, run: RunInfo) -> JsonlFile:
        folder = RunFolder(run.folder)
        return JsonlFile(folder.storage, folder.metrics, run.first_round)


def _cut(storage: Storage, name: str, first_round: int) -> None:
    """Keep only the rounds before `first_round`.

    Raises:
        ValueError: A line in the middle is not a JSON object with a round.
    """
    text = read_text(storage, name) if storage.exists(name) else ""
    # A process killed while writing leaves an incomplete last line.
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    where = f"{storage.location}/{name}"
    kept = [line for number, line in enumerate(lines, start=1) if _round(line, f"{where}, line {number}") < first_round]
    storage.write(name, "".join(kept).encode())


def _round(line: str, where: str) -> float:
    try:
        return json.loads(line)["round"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is {line.strip()[:80]!r}: it must be a JSON object with a round") from error
