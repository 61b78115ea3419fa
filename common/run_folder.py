"""What a run leaves, and where; and the lease that keeps a second start out."""

import fcntl
import importlib.metadata
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from common.config import Recipe
from common.storage import Storage

LEASE = "lease.json"
CONTROL = "control.json"  # what `ddpo scale` asks of the driver
WATCHDOG = "watchdog.txt"
LEASE_SECONDS = 60.0  # a lease that was not renewed for longer has lost its owner, unless that is seen to live
RENEWAL_SECONDS = 15.0
SETTLE_SECONDS = 2.0  # after which two starts at the same instant see which of them wrote last
START_TOLERANCE = 2.0  # seconds; a process's start is told from the machine's, which a clock may move a little
VERSIONED = ("ray-ddpo", "torch", "diffusers", "transformers", "peft", "ray", "numpy")
WEIGHTS = ("lora", "unet")  # folders of a run, whichever was trained


class RunFolder:
    """Names the places in a run's folder, on a disk or in an object store (design: one folder a run)."""

    recipe = "recipe.toml"
    metrics = "metrics.jsonl"

    def __init__(self, location: str | Path) -> None:
        self.storage = Storage(location)

    @property
    def location(self) -> str:
        """An absolute path or a URI."""
        return self.storage.location

    @property
    def checkpoints(self) -> Storage:
        return self.storage.folder("checkpoints")

    @property
    def rollouts(self) -> Storage:
        return self.storage.folder("rollouts")

    @property
    def lora(self) -> Storage:
        return self.storage.folder("lora")

    @property
    def report(self) -> Storage:
        return self.storage.folder("report")

    def where_everything_lies(self) -> str:
        """What a finished run has left, a line each."""
        places = {
            "weights": "lora/pytorch_lora_weights.safetensors",
            "whole network": "unet",
            "metrics": self.metrics,
            "rollouts": "rollouts",
            "checkpoints": "checkpoints",
            "recipe": self.recipe,
        }
        there = {name: place for name, place in places.items() if self.storage.exists(place)}
        return "\n".join(f"{name:<13} {self.storage.folder(place).location}" for name, place in there.items())

    def create(self) -> None:
        """Make the folder and see that it can be written. ValueError: it cannot."""
        probe = f".writable-{os.getpid()}"
        try:
            self.storage.write(probe, b"")
            self.storage.remove(probe)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"output_dir: the run folder {self.location} cannot be written: {reason}") from error

    def write_recipe(self, tables: dict[str, Any]) -> None:
        """The recipe as resolved, which is itself a recipe, with the versions that ran it in its head."""
        versions = "".join(f"# {package} {_version(package)}\n" for package in VERSIONED)
        self.storage.write(self.recipe, (versions + tomli_w.dumps(without_none(tables))).encode())

    def write_watchdog(self, dump: str) -> None:
        """Keep the dump of a run that the watchdog ended."""
        self.storage.write(WATCHDOG, dump.encode())

    def asked(self) -> dict[str, int]:
        """The numbers of workers that `ddpo scale` has asked for, by role."""
        try:
            return json.loads(self.storage.read(CONTROL))
        except FileNotFoundError:
            return {}

    def ask(self, wanted: dict[str, int]) -> None:
        """Ask for numbers of workers, by role; the driver looks about once a second."""
        self.storage.write(CONTROL, json.dumps({**self.asked(), **wanted}).encode())

    def recipe_tables(self) -> dict[str, Any]:
        """The tables of the recipe that the run was made with."""
        return tomllib.loads(self.storage.read(self.recipe).decode())

    def load_recipe(self, overrides: list[str]) -> Recipe:
        """The recipe that the run was made with, and overrides over it. ValueError: there is no run."""
        if not self.storage.exists(self.recipe):
            raise ValueError(f"{self.location} is no run's folder: it has no {self.recipe}")
        return Recipe.from_toml(self.storage.read(self.recipe).decode(), f"{self.location}/{self.recipe}", overrides)


@contextmanager
def weights_here(location: str) -> Iterator[Path]:
    """A path on this machine to the weights of a run, or to a LoRA's folder or file, wherever those are."""
    if "://" not in location:
        yield Path(location)
        return
    storage = Storage(location)
    of_run = [name for name in WEIGHTS if storage.exists(name)]
    with tempfile.TemporaryDirectory() as scratch:
        for name in of_run:
            storage.copy_out(name, Path(scratch))
        if not of_run:
            folder, _, name = location.rstrip("/").rpartition("/")
            Storage(folder).copy_out(name, Path(scratch))
        yield Path(scratch) if of_run else Path(scratch) / storage.name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from its source"


def without_none(value: Any) -> Any:
    """TOML has no null: a key that is None is left out, which means its default."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


class Lease:
    """A run folder's lock, renewed while its owner lives. Use as a context manager; look at `lost` between rounds.

    On a disk of its own one start wins, whatever the instant. Elsewhere the last to write wins, and the others notice.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._storage = folder.storage
        self._token = secrets.token_hex(8)
        self._lost = False
        self._renewed = 0.0
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
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with _alone_in(self._storage):
            if (self._owner() or {}).get("token") == self._token:
                self._storage.remove(LEASE)

    def _write(self, write: Callable[[str, bytes], None]) -> None:
        now = time.time()
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        write(LEASE, json.dumps({**process, "time": now, "token": self._token}).encode())
        self._renewed = now

    def _owner(self) -> dict[str, Any] | None:
        """What the lease says of its owner; nothing of one that was just made, or never got its text. None: no lease."""
        try:
            return json.loads(self._storage.read(LEASE))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

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
        try:
            with _alone_in(self._storage):
                owner = self._owner()
                self._lost = owner is None or owner.get("token") != self._token
                if not self._lost:
                    self._write(self._storage.write)
        except OSError as error:
            # A disk or a network that fails for a moment; after a minute another start may think that this one is dead.
            self._lost = time.time() - self._renewed > LEASE_SECONDS
            print(f"the lease of {self._storage.location} cannot be renewed: {error}", file=sys.stderr, flush=True)
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
        owner = json.loads(folder.storage.read(LEASE))
    except (FileNotFoundError, ValueError):
        return None
    return _who(owner) if _lives(owner) else None
