"""Run one side of a comparison in a separate process that computes a round for each input line and sleeps in between.

Input and output are one JSON object a line. After loading, the process prints {"ready": true, "versions": {…}}.
For each {"save": PATH or absent} it runs a round, saves its weights in PATH, and prints {"sampling", "scoring",
"learning", "round": seconds, "reward": mean of its images, "peak_bytes"}. The program's side (`our_rounds.py`) also accepts
{"bare": true}. The process ends at the end of its input.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.parity.sides import PYTHON, ROOT

Answer = dict[str, Any]
SCRIPTS = Path(__file__).parent


class RoundProcess:
    """One side's process. Its standard output holds answers only; everything else is in its log."""

    def __init__(self, command: list[str], log: Path) -> None:
        compiled = log.with_name(f"{log.stem}-compiled").absolute()
        shutil.rmtree(compiled, ignore_errors=True)  # otherwise an earlier run's compilation would be free
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        self._log = log

    def answer(self) -> Answer:
        """Return the next answer.

        Raises:
            RuntimeError: The process ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self._process.args} ended with {self._process.wait()}:\n{self._log.read_text()[-4000:]}"
            )
        return json.loads(line)

    def ask(self, **asked: Any) -> Answer:
        """Send a request and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        """Kill the process. A pending `answer` then raises an error."""
        self._process.kill()

    def close(self) -> None:
        """Close the input and wait for the end. Kill the process after 30 seconds."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def trl_process(job: dict[str, Any], folder: Path, name: str = "trl") -> Iterator[RoundProcess]:
    """Start TRL on a job that `trl_rounds.py` describes, without waiting until TRL is ready."""
    assert PYTHON.is_file(), f"TRL lives in {PYTHON.parents[1]}, which `make bench-trl` makes"
    with _process(PYTHON, "trl_rounds.py", job, folder / name) as process:
        yield process


@contextmanager
def our_process(recipe: str, overrides: list[str], folder: Path, name: str) -> Iterator[RoundProcess]:
    """Start the program on a recipe, without waiting until the program is ready."""
    job = {"recipe": recipe, "overrides": overrides}
    with _process(Path(sys.executable), "our_rounds.py", job, folder / name) as process:
        yield process


@contextmanager
def _process(python: Path, script: str, job: dict[str, Any], place: Path) -> Iterator[RoundProcess]:
    """Write the job, start its script, and close the process afterwards."""
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f"{place.name}.json")
    path.write_text(json.dumps(job, indent=1), encoding="utf-8")
    where = ["-m", "benchmarks.our_rounds"] if script == "our_rounds.py" else [str(SCRIPTS / script)]
    process = RoundProcess([str(python), *where, str(path)], place.with_name(f"{place.name}.log"))
    try:
        yield process
    finally:
        process.close()
