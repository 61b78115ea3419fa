"""The lease on a run's folder: it keeps a second start out, and expires if its owner dies."""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from pydantic import BaseModel, Field, ValidationError

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage

LEASE = "lease.json"
LEASE_SECONDS = 60.0  # a lease not renewed for longer has expired, unless its owner is known to be alive
RENEWAL_SECONDS = 15.0
SETTLE_SECONDS = 2.0  # after that, two simultaneous starts see which of them wrote last
START_TOLERANCE = 2.0  # seconds; a process's start is relative to the machine's, which clock changes may shift


class Owner(BaseModel):
    """A lease's contents: who holds it."""

    host: str
    pid: int = Field(ge=1, lt=2**31)
    time: float  # seconds since 1970, of the last renewal
    started: float | None = None
    token: str | None = None


class LeaseLost(RuntimeError):
    """Another process has taken over the run's folder, so this one must not write there any more."""


class Lease:
    """A run folder's lock, renewed while its owner lives. Use as a context manager; check `lost` between rounds.

    On a local disk exactly one of several simultaneous starts wins. Elsewhere the last to write wins, and the others
    notice.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._storage = folder.storage.with_patience(0.0)
        self._token = secrets.token_hex(8)
        self.lost = False  # another start may have taken over the folder, so that nothing may be written there
        self._renewed = 0.0
        self._seen = 0.0  # when the lease was last read and still this process's
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

    def __enter__(self) -> "Lease":
        """Acquire the lease. Raise ValueError if the folder belongs to a live run."""
        with _alone_in(self._storage) as alone:
            self._remove_left_behind()
            try:
                self._write(self._storage.create)
            except FileExistsError:
                self._refuse(_owner_of(self._storage) or {})
        if not alone:
            time.sleep(SETTLE_SECONDS)
            owner = _owner_of(self._storage) or {}
            if owner.get("token") != self._token:
                self._refuse(owner)
        self._storage.sweep()
        self._seen = self._renewed
        self._folder.storage.guard = self.check
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.storage.guard = None
        self._stop.set()
        self._thread.join()
        try:
            self._remove()
        except OSError as error:  # a later start sees that this process is gone
            print_line(f"the lease of {self._storage.location} cannot be removed: {error}")

    def check(self, failed: bool) -> None:
        """Raise LeaseLost if another process holds the lease now.

        The lease is read again if a write has `failed`, or if the last renewal is old, as after a suspension.
        """
        if failed or time.time() - self._renewed > 2 * RENEWAL_SECONDS:
            self._renew()
        if self.lost:
            raise LeaseLost(self._storage.location)

    def let_go(self) -> None:
        """Remove the lease before the process is killed, if that is possible in short time."""
        thread = threading.Thread(target=self._remove, daemon=True)
        thread.start()
        thread.join(SETTLE_SECONDS)

    def _remove(self) -> None:
        with _alone_in(self._storage):
            if (_owner_of(self._storage) or {}).get("token") == self._token:
                self._storage.remove(LEASE)

    def _write(self, write: Callable[[str, bytes], None]) -> None:
        now = time.time()
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        write(LEASE, json.dumps({**process, "time": now, "token": self._token}).encode())
        self._renewed = now

    def _remove_left_behind(self) -> None:
        """Remove a dead owner's lease. Raise ValueError if the owner is alive."""
        owner = _owner_of(self._storage)
        if owner == {}:
            time.sleep(SETTLE_SECONDS)  # its owner may be about to write
            owner = _owner_of(self._storage)
        if owner is None:
            return
        if owner and _lives(owner):
            self._refuse(owner)
        print_line(f"taking over {self._storage.location} from {_who(owner)}, which ended without closing it")
        self._storage.remove(LEASE)

    def _refuse(self, owner: dict[str, Any]) -> None:
        seen = f" (seen {time.time() - owner['time']:.0f} s ago)" if owner else ""
        raise ValueError(
            f"the run folder {self._storage.location} is in use by {_who(owner)}{seen}: "
            "stop it, or give another name or output_dir"
        )

    def _keep_renewing(self) -> None:
        while not self.lost and not self._stop.wait(RENEWAL_SECONDS):
            self._renew()

    def _renew(self) -> None:
        """Renew the lease, or find that it is lost."""
        with self._renewing:
            if self.lost or self._stop.is_set():
                return
            try:
                with _alone_in(self._storage):
                    owner = _owner_of(self._storage)
                    self.lost = owner is None or owner.get("token") != self._token
                    self._seen = time.time()
                    if not self.lost:
                        self._write(self._storage.write)
            except OSError as error:
                # Full disk or network failure. If the lease cannot be read for a minute, another start may have it.
                self.lost = time.time() - self._seen > LEASE_SECONDS
                print_line(f"the lease cannot be renewed: {error}")
        if self.lost:
            print_line(f"the lease of {self._storage.location} is lost: this run must write nothing more there")


@contextmanager
def _alone_in(storage: Storage) -> Iterator[bool]:
    """Lock the folder against other processes on this disk for the body. Yield whether that succeeded."""
    if storage.local_path is None:
        yield False
        return
    descriptor = os.open(storage.local_path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the system releases the lock when the process dies
            locked = True
        except OSError:  # not every network filesystem locks folders
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _owner_of(storage: Storage) -> dict[str, Any] | None:
    """Return the lease's contents; None if there is no lease, empty if it is unreadable, as one just created."""
    try:
        return Owner.model_validate_json(storage.read(LEASE)).model_dump(exclude_none=True)
    except FileNotFoundError:
        return None
    except ValidationError:
        return {}


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner else "a start that did not get far"


def _lives(owner: dict[str, Any]) -> bool:
    """Return whether the owner is alive. On another host, this means that it renewed its lease within a minute."""
    if owner["host"] != socket.gethostname():
        return time.time() - owner["time"] < LEASE_SECONDS
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner.get("started", process.create_time())) < START_TOLERANCE
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runs_it(folder: RunFolder) -> str | None:
    """Describe the process that works on this run; None if there is none."""
    owner = _owner_of(folder.storage)
    return _who(owner) if owner and _lives(owner) else None
