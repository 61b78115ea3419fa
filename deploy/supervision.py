"""Supervision: what reaches a driver from outside while it works: a signal to stop, another number of workers, a lost lease."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from common.config import Recipe
from common.lease import Lease
from common.reward_pools import elastic_roles, refused
from common.run_folder import CONTROL, RunFolder

POLL_SECONDS = 1.0
REMOTE_POLL_SECONDS = 5.0  # of an object store, which counts requests


class Stopped(Exception):
    """Somebody asked the run to stop; what it has learned is committed on the way out."""

    def __init__(self, why: str, exit_code: int, may_commit: bool = True) -> None:
        super().__init__(why)
        self.exit_code = exit_code
        self.may_commit = may_commit  # not where the folder is another's by now


class Supervision:
    """Use as a context manager. `check` is called between any two steps of the driver's work, about once a second or more."""

    def __init__(self, folder: RunFolder, recipe: Recipe, lease: Lease) -> None:
        self._folder = folder
        self._recipe = recipe
        self._lease = lease
        self._poll_seconds = POLL_SECONDS if folder.storage.local_path else REMOTE_POLL_SECONDS
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._next_poll = 0.0
        self._asked: dict[str, int] = {}
        self._told = ""  # last, of what was asked and cannot be done
        self.on_scale: dict[str, Callable[[int], None]] = {}  # by role; set by who can

    def __enter__(self) -> "Supervision":
        self._folder.storage.remove(CONTROL)  # what was asked of an earlier start
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals; again after `ray.init`, which takes them for itself."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once, without a commit
        self._signal = signal.Signals(number)

    def check(self) -> None:
        """Stopped: a signal came, or another process has taken the run's folder over. Also sees to `ddpo scale`."""
        if self._signal is not None:
            raise Stopped(f"stopped by {self._signal.name}", 128 + self._signal)
        if self._lease.lost:
            raise Stopped(f"another process has taken over {self._folder.location}", 1, may_commit=False)
        if self.on_scale and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + self._poll_seconds
            self._scale()

    def _scale(self) -> None:
        tables = elastic_roles(self._recipe)
        try:
            asked = self._folder.asked()
            wrong = [why for role, count in asked.items() if (why := refused(tables, role, count))]
        except ValueError as error:
            asked, wrong = {}, [str(error)]
        if wrong:  # no reason to end a run
            self._tell(f"what was asked is not done: {'; '.join(wrong)}")
            return
        for role, scale in self.on_scale.items():
            table = tables[role]
            count = asked.get(role, self._asked.get(role, table.count))
            if count != self._asked.get(role, table.count):
                print(f"{role}: {self._asked.get(role, table.count)} → {count}, as asked", file=sys.stderr, flush=True)
                scale(count)
                self._asked[role] = count

    def _tell(self, text: str) -> None:
        """Once, though it is found again at every look."""
        if text != self._told:
            print(text, file=sys.stderr, flush=True)
            self._told = text
