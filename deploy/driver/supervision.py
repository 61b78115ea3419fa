"""Supervision: react to external events during a run: signals, `ddpo scale`, a lost lease, a lost cluster."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import elastic_roles, refused
from ray_ddpo.common.run_storage.lease import Lease, LeaseLost
from ray_ddpo.common.run_storage.run_folder import CONTROL, RunFolder
from ray_ddpo.common.run_storage.storage import StorageError
from ray_ddpo.deploy.driver.cluster_watch import ClusterWatch
from ray_ddpo.deploy.driver.reaper import leave

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NOTICE_SECONDS = 2.0  # after a failed call: wait for the notice that the cluster is lost
LOSS_SECONDS = 5.0  # for the driver to notice a lost cluster; after that it must be stuck in a call of Ray
POLL_SECONDS = 1.0
REMOTE_POLL_SECONDS = 5.0  # for an object store, which charges for requests


class Stopped(Exception):
    """Early end of a run: by a signal, or because its folder, its storage or its cluster is lost."""

    def __init__(self, why: str, exit_code: int, may_commit: bool = True, cluster_is_lost: bool = False) -> None:
        super().__init__(why)
        self.exit_code = exit_code
        self.cluster_is_lost = cluster_is_lost  # then Ray cannot be shut down
        self.may_commit = may_commit  # False if another process owns the folder now


EXPECTED = (Stopped, KeyboardInterrupt, ValueError, StorageError, LeaseLost)


class Supervision:
    """Context manager around a run. The driver calls `check` between its steps, at least about once a second."""

    def __init__(self, folder: RunFolder, recipe: Recipe, lease: Lease) -> None:
        self._folder = folder
        self._recipe = recipe
        self._lease = lease
        self._poll_seconds = POLL_SECONDS if folder.storage.local_path else REMOTE_POLL_SECONDS
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._watch: ClusterWatch | None = None
        self._loss = ""  # of the cluster, in words
        self._is_lost = threading.Event()
        self._is_stopping = threading.Event()
        self._next_poll = 0.0
        self._asked: dict[str, int] = {}
        self._refusal = ""  # the last printed refusal of a request
        self.on_scale: dict[str, Callable[[int], None]] = {}  # by role; set once the actors run
        self.saved: Callable[[], str] | None = None  # describes the last checkpoint; set before the first round

    def __enter__(self) -> "Supervision":
        self._folder.storage.remove(CONTROL)  # requests to an earlier start
        self.listen()
        return self

    def listen(self) -> None:
        """Install the signal handlers. Call again after `ray.init`, which replaces them."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # as nohup asks
                continue
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Convert a lost cluster, a lost lease or a storage error to an exception with a one-line message."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._watch is not None:
            if error is not None and not isinstance(error, EXPECTED):
                self._is_lost.wait(NOTICE_SECONDS)
            self._watch.stop()
        if error is None or isinstance(error, Stopped | KeyboardInterrupt):
            return
        if self.cluster_is_lost:  # calls on a lost cluster fail with various errors
            raise self._cluster_lost() from error
        if isinstance(error, LeaseLost):
            raise self._lease_lost() from error
        if isinstance(error, StorageError):
            failed = getattr(
                error, "cause", error
            )  # without the traceback that Ray puts into the text of an actor's error
            if self.saved is None:
                raise ValueError(f"output_dir: {failed}") from error
            raise Stopped(f"{failed}; {self.saved()}", 1) from error

    def watch(self, watch: ClusterWatch) -> None:
        """Take over a cluster watch, to stop it at the end."""
        self._watch = watch

    @property
    def cluster_is_lost(self) -> bool:
        return self._is_lost.is_set()

    def lose_cluster(self, what: str) -> None:
        """Make `check` end the run.

        If the driver does not call `check` in time, end the process. Called from a thread.
        """
        _silence_libraries()
        self._loss = f"the Ray cluster is lost: {what}"
        self._is_lost.set()
        if not self._is_stopping.wait(LOSS_SECONDS):
            print_line(f"ddpo train: {self._loss}; resume with --resume auto")
            self._lease.let_go()
            leave(1)

    def _cluster_lost(self) -> Stopped:
        self._is_stopping.set()
        return Stopped(self._loss, 1, cluster_is_lost=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the run at once, without a checkpoint
        self._signal = signal.Signals(number)

    def check(self) -> None:
        """End the run if it must stop; otherwise apply requests of `ddpo scale`.

        Raises:
            Stopped: a signal came, the cluster is lost, or another process has taken over the run's folder.
        """
        if self._signal is not None:
            self._is_stopping.set()
            raise Stopped(f"stopped by {self._signal.name}", 128 + self._signal, cluster_is_lost=self.cluster_is_lost)
        if self.cluster_is_lost:
            raise self._cluster_lost()
        if self._lease.lost:
            raise self._lease_lost()
        if self.on_scale and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + self._poll_seconds
            self._scale()

    def _lease_lost(self) -> Stopped:
        return Stopped(f"another process has taken over {self._folder.location}", 1, may_commit=False)

    def _scale(self) -> None:
        """Read the requested worker counts, and scale the pools."""
        tables = elastic_roles(self._recipe)
        try:
            asked = self._folder.asked()
            wrong = [why for role, count in asked.items() if (why := refused(self._recipe, role, count))]
        except ValueError as error:
            asked, wrong = {}, [str(error)]
        if wrong:
            refusal = f"request to scale refused: {'; '.join(wrong)}"
            if refusal != self._refusal:  # found again at every poll, but printed once
                print_line(refusal)
                self._refusal = refusal
            return
        for role, scale in self.on_scale.items():
            table = tables[role]
            count = asked.get(role, self._asked.get(role, table.count))
            if count != self._asked.get(role, table.count):
                print_line(f"{role}: {self._asked.get(role, table.count)} → {count}, as asked")
                scale(count)
                self._asked[role] = count


@contextmanager
def sheltered_from_hangup() -> Iterator[None]:
    """Let processes started inside ignore SIGHUP, which a closed terminal sends to all; the driver handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, handler)


def _silence_libraries() -> None:
    """Reserve standard error for our own lines, because Ray reports a lost cluster at length from C++."""
    own = os.dup(2)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    os.dup2(sys.stdout.fileno(), 2)
    sys.stderr = os.fdopen(own, "w", buffering=1, errors="backslashreplace")
