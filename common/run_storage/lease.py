"""The lease on a run's folder: what keeps a second start out, and what a dead owner does not hold for ever."""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from pydantic import BaseModel, Field, ValidationError

from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage

LEASE = "lease.json"
LEASE_SECONDS = 60.0  # a lease that was not renewed for longer has lost its owner, unless that is seen to live
RENEWAL_SECONDS = 15.0
SETTLE_SECONDS = 2.0  # after which two starts at the same instant see which of them wrote last
START_TOLERANCE = 2.0  # seconds; a process's start is told from the machine's, which a clock may move a little


class Owner(BaseModel):
    """What a lease says of who holds it."""

    host: str
    pid: int = Field(ge=1, lt=2**31)
    time: float  # seconds since 1970, of the last renewal
    started: float | None = None
    token: str | None = None


class LeaseLost(RuntimeError):
    """Another process has taken the run's folder over: this one must write nothing more there."""


class Lease:
    """A run folder's lock, renewed while its owner lives. Use as a context manager; look at `lost` between rounds.

    On a disk of its own one start wins, whatever the instant. Elsewhere the last to write wins, and the others notice.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._storage = folder.storage.with_patience(0.0)
        self._token = secrets.token_hex(8)
        self._lost = False
        self._renewed = 0.0
        self._seen = 0.0  # when it was last read, and this process's
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another start may have taken the folder over: then nothing more may be written there."""
        return self._lost

    def __enter__(self) -> "Lease":
        """ValueError: the folder belongs to a run that is alive."""
        with _alone_in(self._storage) as alone:
            self._remove_left_behind()
            try:
                self._write(self._storage.create)
            except FileExistsError:
                self._refuse(self._owner() or {})
        if not alone:
            time.sleep(SETTLE_SECONDS)
            owner = self._owner() or {}
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
        except OSError as error:  # no reason to end a run in another way: a later start sees that this process is gone
            print(f"the lease of {self._storage.location} cannot be removed: {error}", file=sys.stderr, flush=True)

    def check(self, failed: bool) -> None:
        """Raise LeaseLost if the lease is another's now. `failed`: a write was refused, which may be the other's doing.

        A process that was suspended for long looks before it writes on.
        """
        if failed or time.time() - self._renewed > 2 * RENEWAL_SECONDS:
            self._renew()
        if self._lost:
            raise LeaseLost(self._storage.location)

    def let_go(self) -> None:
        """Remove the lease before the process is ended in the middle of something, if that can be done soon."""
        thread = threading.Thread(target=self._remove, daemon=True)
        thread.start()
        thread.join(SETTLE_SECONDS)

    def _remove(self) -> None:
        with _alone_in(self._storage):
            if (self._owner() or {}).get("token") == self._token:
                self._storage.remove(LEASE)

    def _write(self, write: Callable[[str, bytes], None]) -> None:
        now = time.time()
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        write(LEASE, json.dumps({**process, "time": now, "token": self._token}).encode())
        self._renewed = now

    def _owner(self) -> dict[str, Any] | None:
        """What the lease says of its owner; nothing of one that is no lease's text, as of one just made. None: no lease."""
        try:
            return _read_owner(self._storage.read(LEASE))
        except FileNotFoundError:
            return None

    def _remove_left_behind(self) -> None:
        owner = self._owner()
        if owner == {}:
            time.sleep(SETTLE_SECONDS)  # its owner may be about to write it
            owner = self._owner()
        if owner is None:
            return
        if owner and _lives(owner):
            self._refuse(owner)
        print(
            f"taking over {self._storage.location} from {_who(owner)}, which ended without closing it", file=sys.stderr
        )
        self._storage.remove(LEASE)

    def _refuse(self, owner: dict[str, Any]) -> None:
        seen = f" (seen {time.time() - owner['time']:.0f} s ago)" if owner else ""
        raise ValueError(
            f"the run folder {self._storage.location} is in use by {_who(owner)}{seen}: "
            "stop it, or give another name or output_dir"
        )

    def _keep_renewing(self) -> None:
        while not self._lost and not self._stop.wait(RENEWAL_SECONDS):
            self._renew()

    def _renew(self) -> None:
        with self._renewing:
            if self._lost or self._stop.is_set():
                return
            try:
                with _alone_in(self._storage):
                    owner = self._owner()
                    self._lost = owner is None or owner.get("token") != self._token
                    self._seen = time.time()
                    if not self._lost:
                        self._write(self._storage.write)
            except OSError as error:
                # A disk that is full, or a network that fails for a moment. Who cannot even read the lease for a minute
                # cannot know that no other start has taken it.
                self._lost = time.time() - self._seen > LEASE_SECONDS
                print(f"the lease cannot be renewed: {error}", file=sys.stderr, flush=True)
        if self._lost:
            text = f"the lease of {self._storage.location} is lost: this run must write nothing more there"
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _alone_in(storage: Storage) -> Iterator[bool]:
    """Keep other processes on the disk out of the same lines; whether that could be done."""
    if storage.local_path is None:
        yield False
        return
    descriptor = os.open(storage.local_path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the system ends it with the process, however that dies
            locked = True
        except OSError:  # not every network filesystem locks folders
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _read_owner(text: bytes) -> dict[str, Any]:
    try:
        return Owner.model_validate_json(text).model_dump(exclude_none=True)
    except ValidationError:
        return {}


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner else "a start that did not get far"


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the owner is seen to live on this host; of another host, whether it renewed its lease within a minute."""
    if owner["host"] != socket.gethostname():
        return time.time() - owner["time"] < LEASE_SECONDS
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner.get("started", process.create_time())) < START_TOLERANCE
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runs_it(folder: RunFolder) -> str | None:
    """Which process is at work on this run, in words; None: nobody is."""
    try:
        owner = _read_owner(folder.storage.read(LEASE))
    except FileNotFoundError:
        return None
    return _who(owner) if owner and _lives(owner) else None
