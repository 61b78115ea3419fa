"""A side of a comparison as a process of its own: it makes a round for each line that it is given, and sleeps in between.

It is told one JSON object a line and answers with one. When it has loaded: {"ready": true, "versions": {…}}. Then, for each
{"save": PATH or absent}, a round, and afterwards its weights in PATH: {"sampling", "scoring", "learning", "round": seconds,
"reward": mean of its images, "peak_bytes"}. The program's side (`our_rounds.py`) also knows {"bare": true}. At the end of its
input it ends.
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
    """One such process; it is silent but for its answers, and its log says the rest."""

    def __init__(self, command: list[str], log: Path) -> None:
        compiled = log.with_name(f"{log.stem}-compiled").absolute()
        shutil.rmtree(compiled, ignore_errors=True)  # what an earlier run has compiled would be free otherwise
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
        """The next one. RuntimeError: the process has ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self._process.args} ended with {self._process.wait()}:\n{self._log.read_text()[-4000:]}"
            )
        return json.loads(line)

    def ask(self, **asked: Any) -> Answer:
        """Say something and wait for what comes back."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        """End it at once, whatever it does; who waits for its answer is told."""
        self._process.kill()

    def close(self) -> None:
        """Let it end: by the end of its input, or where it does not listen, by force."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def trl_process(job: dict[str, Any], folder: Path, name: str = "trl") -> Iterator[RoundProcess]:
    """TRL on a job that `trl_rounds.py` describes, not yet asked whether it is ready."""
    assert PYTHON.is_file(), f"TRL lives in {PYTHON.parents[1]}, which `make bench-trl` makes"
    with _process(PYTHON, "trl_rounds.py", job, folder / name) as process:
        yield process


@contextmanager
def our_process(recipe: str, overrides: list[str], folder: Path, name: str) -> Iterator[RoundProcess]:
    """The program on a recipe, not yet asked whether it is ready."""
    job = {"recipe": recipe, "overrides": overrides}
    with _process(Path(sys.executable), "our_rounds.py", job, folder / name) as process:
        yield process


@contextmanager
def _process(python: Path, script: str, job: dict[str, Any], place: Path) -> Iterator[RoundProcess]:
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f"{place.name}.json")
    path.write_text(json.dumps(job, indent=1), encoding="utf-8")
    where = ["-m", "benchmarks.our_rounds"] if script == "our_rounds.py" else [str(SCRIPTS / script)]
    process = RoundProcess([str(python), *where, str(path)], place.with_name(f"{place.name}.log"))
    try:
        yield process
    finally:
        process.close()
