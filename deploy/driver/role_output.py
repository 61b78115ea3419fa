"""Output of roles: from their processes to the driver's terminal and into the run's folder, through Ray's log stream.

Ray reads the output of every process on every node and sends it to the driver, so a dying process loses no line. A role
marks its lines with its name, to distinguish them from Ray's lines.
"""

import io
import os
import re
import sys
import threading
import time
from collections import defaultdict
from typing import Any, TextIO

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.process_deaths import Death, cause_of
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.user_code.frames import is_users

RAYS_TOKENS = (":actor_name:", ":task_name:", ":job_id:")  # lines for Ray's log monitor
MARKED = re.compile(
    r"\[((?:sampler|reward-worker|scorer|learner)[\w.-]*-\d+)\]([ #])(.*)", re.DOTALL
)  # '#': for the file only
EXITS = "exit code {} (os._exit)"
FATAL = re.compile(r"Fatal Python error: (.+)")
SIGNALS = {
    "Aborted": "SIGABRT",
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating-point exception": "SIGFPE",
}
FRAME = re.compile(r'File "(.+)", line (\d+) in ')
REMOTE_SECONDS = 30.0  # between two writes into an object store, which cannot append
QUIET_SECONDS, LONGEST_WAIT_SECONDS = 0.4, 3.0  # at the end: required silence, and the longest wait for it
LAST_WORDS_SECONDS = 1.5  # for the output of a dying process to reach the driver
UNKNOWN = "its process was killed (SIGKILL), as the kernel does where memory runs out"
UNHEARD = "its process crashed or was killed"
OTHERS = "ray"  # the log file of Ray's own lines


class LabelledOutput(io.TextIOBase):
    """A text stream that puts a role's name before each complete line and flushes the line at once."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream = stream
        self._label = label
        self._begun = threading.local()  # each thread's incomplete line

    def write(self, text: str) -> int:
        *lines, self._begun.line = (getattr(self._begun, "line", "") + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self._labelled(line)}\n" for line in lines))
            self.stream.flush()
        return len(text)

    def _labelled(self, line: str) -> str:
        if line.startswith(RAYS_TOKENS):
            return line
        last_state = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar
        return f"[{self._label}] {last_state}"

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)  # such as `buffer`, whose bytes reach the log file unmarked


def label_output(label: str) -> TextIO:
    """Mark this process's output as a role's from now on; return a stream whose lines go to the log file only."""
    plain = sys.stderr
    print(f"[{label}]#started as process {os.getpid()}", file=plain, flush=True)
    sys.stdout, sys.stderr = LabelledOutput(sys.stdout, label), LabelledOutput(plain, label)
    exit_now, process = os._exit, os.getpid()

    def tell_and_exit(status: int) -> None:
        if os.getpid() == process:  # not in a forked child
            print(f"[{label}]#{EXITS.format(status)}", file=plain, flush=True)
        exit_now(status)

    os._exit = tell_and_exit  # type: ignore[assignment]  # Ray does not report the exit code
    return plain


class RoleOutput:
    """Receiver of the roles' output. Marked lines are printed on the terminal; all lines are kept in `logs`."""

    def __init__(self, logs: Storage) -> None:
        self._logs = logs
        self._labels: dict[tuple[str, Any], str] = {}  # by node and process
        self._ends: dict[str, list[str]] = defaultdict(list)  # by role: how and where its process said that it ends
        self._unwritten: dict[str, list[str]] = defaultdict(list)
        self._written = self._came = time.monotonic()
        self._changed = threading.Condition()
        self._is_read = self._is_kept = True
        self.attached = False

    def attach(self) -> None:
        """Receive the lines that Ray would print. Call this before `ray.init(log_to_driver=True)`."""
        import ray._private.worker

        ray._private.worker.print_to_stdstream = self._take
        self.attached = True

    def _take(self, data: dict[str, Any], ignore_prefix: bool = False) -> None:
        """Receive lines of one process from Ray's log stream. Ray calls this from its threads."""
        process = (str(data.get("ip")), data.get("pid"))
        if process[1] in ("autoscaler", "gcs_server"):
            return
        with self._changed:
            for line in data["lines"]:
                self._take_line(line, process, to_stdout=not data["is_err"])
            self._came = time.monotonic()
            if self._logs.local_path or self._came - self._written > REMOTE_SECONDS:
                self._write()
            self._changed.notify_all()

    def _take_line(self, line: str, process: tuple[str, Any], to_stdout: bool) -> None:
        """Print a marked line, and keep every line for the log file of its role."""
        if marked := MARKED.fullmatch(line):
            label, kind, text = marked.groups()
            self._labels[process] = label
            if kind == " " and self._is_read:
                self._print(line, to_stdout)
        else:
            label, text = self._labels.get(process, OTHERS), line
        self._note_end(label, text)
        self._unwritten[label].append(text)

    def _print(self, line: str, to_stdout: bool) -> None:
        try:
            print_line(line, to_stdout)
        except BrokenPipeError:  # the terminal was closed; the driver's main thread handles that
            self._is_read = False

    def _note_end(self, label: str, text: str) -> None:
        if text.startswith(EXITS.partition("{")[0]) and text.endswith("(os._exit)"):
            self._ends[label] = [text]
        elif fatal := FATAL.match(text):
            self._ends[label] = [SIGNALS.get(fatal[1].strip(), fatal[1].strip())]
        elif len(self._ends.get(label, ())) == 1 and (frame := FRAME.search(text)) and is_users(frame[1]):
            self._ends[label].append(f"in {frame[1]}:{frame[2]}")

    def last_words(self, label: str, seconds: float) -> str | None:
        """Return how a process said that it ends; wait, because these lines may arrive after Ray reports the death."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while label not in self._ends and self.attached and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return " ".join(self._ends[label]) if label in self._ends else None

    def _write(self) -> None:
        """Append the collected lines to the log files. If the storage refuses, stop keeping them."""
        unwritten, self._unwritten = self._unwritten, defaultdict(list)
        self._written = time.monotonic()
        try:
            for label, lines in unwritten.items() if self._is_kept else ():
                self._logs.append(f"{label}.log", "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:  # not worth ending a run
            self._is_kept = False
            print_line(f"what roles print is no longer kept in {self._logs.location}: {error}")

    def close(self) -> None:
        """Wait for lines that are still on their way, and write them."""
        closed = time.monotonic()
        while self.attached and time.monotonic() < min(
            closed + LONGEST_WAIT_SECONDS, max(closed, self._came) + QUIET_SECONDS
        ):
            time.sleep(QUIET_SECONDS / 4)
        with self._changed:
            self._write()


class DeathLines:
    """Printer of deaths. It uses threads, because the cause of a death is known a moment after the death."""

    def __init__(self, output: RoleOutput) -> None:
        self._output = output
        self._telling: list[threading.Thread] = []

    def tell(self, label: str, death: Death, then: str) -> None:
        """Print a death soon; `then` says how the run reacts."""
        telling = threading.Thread(target=self._tell, args=(label, death, then), name="death-lines", daemon=True)
        self._telling = [each for each in self._telling if each.is_alive()] + [telling]
        telling.start()

    def _tell(self, label: str, death: Death, then: str) -> None:
        cause = cause_of(death.reason)
        if cause is None:
            unknown = UNKNOWN if self._output.attached else UNHEARD
            cause = self._output.last_words(label, LAST_WORDS_SECONDS) or unknown
        ended = "was ended" if death.by_driver else "died"
        at = f" {death.at}" if death.at else ""
        print_line(f"{label} {ended}{at}: {cause}; {then}")

    def close(self) -> None:
        """Wait until all lines are printed."""
        for telling in self._telling:
            telling.join()
