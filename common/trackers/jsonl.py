"""Metrics as `metrics.jsonl` in the run's folder: one JSON object a round, written as soon as the round ends."""

import json
import math
from pathlib import Path

from common.run_folder import RunFolder, write_atomically
from common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker


class JsonlFile(LiveTracker):
    """The open file. Rounds that a resumed run does again are cut away first."""

    def __init__(self, path: Path, first_round: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, first_round)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        # JSON has no NaN and no infinity: a reader other than Python's would stop there.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


class Jsonl(Tracker):
    """No keys: the file's place is part of what a run leaves."""

    def check(self) -> None:
        """Nothing is needed."""

    def start(self, run: RunInfo) -> JsonlFile:
        return JsonlFile(RunFolder(run.folder).metrics, run.first_round)


def _cut(path: Path, first_round: int) -> None:
    """Leave the rounds before `first_round`. ValueError: a line in the middle is no JSON object with a round."""
    if not path.exists():
        return
    # A process that was killed while it wrote leaves a last line without its end.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for number, line in enumerate(lines, start=1) if _round(line, f"{path}, line {number}") < first_round]
    write_atomically(path, "".join(kept).encode())


def _round(line: str, where: str) -> float:
    try:
        return json.loads(line)["round"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is {line.strip()[:80]!r}: it must be a JSON object with a round") from error
