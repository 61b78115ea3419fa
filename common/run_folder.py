"""What a run leaves on disk, and where; and the lease that keeps a second start out."""

import importlib.metadata
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import tomli_w

LEASE_SECONDS = 60.0  # a lease of another host that is older has lost its owner
RENEWAL_SECONDS = 15.0
VERSIONED = ("ray-ddpo", "torch", "diffusers", "transformers", "peft", "ray", "numpy")


class RunFolder:
    """Names the places in a run's folder (design: one folder a run)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lora(self) -> Path:
        return self.path / "lora"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def where_everything_lies(self) -> str:
        """What a finished run has left, a line each."""
        places = {
            "weights": self.lora / "pytorch_lora_weights.safetensors",
            "whole network": self.path / "unet",
            "metrics": self.metrics,
            "checkpoints": self.checkpoints,
            "recipe": self.recipe,
        }
        return "\n".join(f"{name:<13} {place}" for name, place in places.items() if place.exists())

    def create(self) -> None:
        """Make the folder and see that it can be written. ValueError: it cannot."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"output_dir: the run folder {self.path} cannot be written: {error.strerror}") from error

    def write_recipe(self, tables: dict[str, Any]) -> None:
        """The recipe as resolved, which is itself a recipe, with the versions that ran it in its head."""
        versions = "".join(f"# {package} {_version(package)}\n" for package in VERSIONED)
        write_atomically(self.recipe, (versions + tomli_w.dumps(without_none(tables))).encode())


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename over it: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Lease:
    """A run folder's lock: host, process and time, renewed while the owner lives. Use as a context manager."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / "lease.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lease":
        """ValueError: the folder belongs to a run that is alive."""
        self._refuse_living_owner()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _refuse_living_owner(self) -> None:
        if not self._path.exists():
            return
        owner = json.loads(self._path.read_text())
        age = time.time() - owner["time"]
        here = owner["host"] == socket.gethostname()
        alive = _process_lives(owner["pid"]) if here else age < LEASE_SECONDS
        if alive:
            raise ValueError(
                f"the run folder {self._path.parent} is in use by process {owner['pid']} on {owner['host']} "
                f"(seen {age:.0f} s ago): stop it, or give another name or output_dir"
            )
        print(
            f"taking over {self._path.parent} from process {owner['pid']} on {owner['host']}, which ended without closing it",
            file=sys.stderr,
        )

    def _write(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_atomically(self._path, json.dumps(owner).encode())

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL_SECONDS):
            self._write()


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
