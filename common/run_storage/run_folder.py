"""A run's output paths."""

import json
import os
import secrets
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, StrictInt, TypeAdapter, ValidationError

from ray_ddpo.common.base_parts import Base, as_tables, read_base
from ray_ddpo.common.model_files.weight_files import TRAINED_PARTS
from ray_ddpo.common.package_versions import VERSIONED, package_version
from ray_ddpo.common.reading import reading
from ray_ddpo.common.recipe.recipe import RECIPE_FILE, Recipe
from ray_ddpo.common.run_storage.reading import read_json, read_text
from ray_ddpo.common.run_storage.run_code import FOLDER as CODE
from ray_ddpo.common.run_storage.run_code import find_code
from ray_ddpo.common.run_storage.storage import Storage, StorageError, Unwritten

START_SECONDS = 5.0  # in which an object store must accept a first file
PROBE_BYTES = 2**16
CONTROL = "control.json"  # the numbers of workers that `ddpo scale` requests
BASE_FILE = "base.json"  # fingerprints of everything the run depends on
WATCHDOG = "watchdog.txt"
TOKEN = "token.txt"
GUARD = "guard.json"  # present if the guard has ended the run
BEST = "best.json"  # in `best/`, written last: which version is stored there
GUARD_KEYS = ("policy_version", "alarms", "weights_of")
BEST_KEYS = ("policy_version", "fingerprint", "best_by", "score")
ASKED = TypeAdapter(dict[str, Annotated[StrictInt, Field(ge=1)]])
WEIGHTS = ("lora", *TRAINED_PARTS)  # folders of trained weights, one of which a run has
MODEL = "model"  # a pipeline that a Python program handed over
GIVEN_PROMPTS = "prompts"  # rows with images that a Python program handed over
FOLDERS = ("checkpoints", "rollouts", "logs", "best", "report", CODE, MODEL, GIVEN_PROMPTS, *WEIGHTS)
FILES = (RECIPE_FILE, "metrics.jsonl", "evaluations.jsonl", BASE_FILE, CONTROL, WATCHDOG, TOKEN, GUARD)


class RunFolder:
    """Paths in a run's folder, on a disk or in an object store."""

    recipe = RECIPE_FILE
    metrics = "metrics.jsonl"

    def __init__(self, location: str | Path) -> None:
        self.storage = Storage(location)
        self.unwritten = Unwritten()

    @property
    def location(self) -> str:
        """Return an absolute path or a URI."""
        return self.storage.location

    @property
    def checkpoints(self) -> Storage:
        return self.storage.folder("checkpoints")

    @property
    def rollouts(self) -> Storage:
        return self.storage.folder("rollouts")

    @property
    def logs(self) -> Storage:
        """Return the folder of the roles' output, one file each."""
        return self.storage.folder("logs")

    @property
    def lora(self) -> Storage:
        return self.storage.folder("lora")

    @property
    def best(self) -> Storage:
        """Return the folder of the weights that were best on held-out images, with the run's own layout."""
        return self.storage.folder("best")

    @property
    def report(self) -> Storage:
        return self.storage.folder("report")

    def output_paths(self) -> str:
        """List the output paths of a finished run, one per line."""
        places = {
            "weights": "lora/pytorch_lora_weights.safetensors",
            **{part: part for part in TRAINED_PARTS},
            "metrics": self.metrics,
            "rollouts": "rollouts",
            "checkpoints": "checkpoints",
            "evaluations": "evaluations.jsonl",
            "best weights": "best",
            "recipe": self.recipe,
        }
        there = {name: place for name, place in places.items() if self.storage.exists(place)}
        return "\n".join(f"{name:<13} {self.storage.folder(place).location}" for name, place in there.items())

    def create(self) -> None:
        """Create the folder. Raise ValueError if it cannot be written, or a path in it is taken by something else."""
        for name in (*FOLDERS, *FILES):
            path = self.storage.folder(name).local_path
            if path and path.exists() and path.is_dir() != (name in FOLDERS):
                is_, must_be = ("a file", "a folder") if name in FOLDERS else ("a folder", "a file")
                raise ValueError(
                    f"output_dir: {path} is {is_} and must be {must_be}: move it away, or give another --name or "
                    "--output_dir"
                )
        probe, storage = f".writable-{os.getpid()}", self.storage.with_patience(START_SECONDS)
        try:
            storage.write(probe, bytes(PROBE_BYTES))  # a full disk may still have room for an empty file
            storage.remove(probe)
        except OSError as error:
            reason = error.reason if isinstance(error, StorageError) else error.strerror or error
            raise ValueError(f"output_dir: the run folder {self.location} cannot be written: {reason}") from error

    @contextmanager
    def token(self) -> Iterator[str]:
        """Put a random token into the run folder for the body. Other nodes verify that they see the same folder."""
        token = secrets.token_hex(8)
        self.storage.write(TOKEN, token.encode())
        try:
            yield token
        finally:
            self.storage.remove(TOKEN)

    def has_token(self, token: str) -> bool:
        """Return whether this process sees `token` in the folder."""
        return self.storage.exists(TOKEN) and self.storage.read(TOKEN) == token.encode()

    def check_token(self, token: str, whose: str) -> None:
        """Check that another process, on the machine `whose`, sees this folder as the driver sees it.

        Raises:
            ValueError: The folder is another one there, so that what that process writes would be lost.
        """
        if not self.has_token(token):
            raise ValueError(
                f"output_dir: {self.location} on {whose} is not the driver's: what the learner writes there would be "
                "lost; give --output_dir a path on storage that all nodes see, or a URI (s3://…)"
            )

    def write_recipe(self, tables: dict[str, Any], base: Base | None = None) -> None:
        """Write the resolved recipe, with the package versions and fingerprints as comments at the top.

        Args:
            tables: the resolved recipe, which is a valid recipe itself.
            base: the fingerprints. They are written first, so that every folder with a recipe has them.
        """
        head = "".join(f"# {package} {package_version(package)}\n" for package in VERSIONED)
        if base is not None:
            self.storage.write(BASE_FILE, json.dumps(as_tables(base), indent=1).encode())
            head += "".join(f"# {name} sha256 {part.sha256}\n" for name, part in sorted(base.items()))
        self.storage.write(self.recipe, (head + tomli_w.dumps(without_none(tables))).encode())

    def base(self) -> Base:
        """Return fingerprints of everything the run depends on. Raise ValueError if they are missing or unusable."""
        where = f"{self.location}/{BASE_FILE}"
        try:
            return read_base(self.storage.read(BASE_FILE), where)
        except FileNotFoundError:
            raise ValueError(
                f"{where} is missing: without this file, the model, prompts and rewards of the run cannot be checked; "
                "restore the file, or begin a new run"
            ) from None

    def guard_ended(self) -> dict[str, Any] | None:
        """Return the version at which the guard ended the run, its alarms, and whose weights the run has, if any."""
        return read_json(self.storage, GUARD, GUARD_KEYS) if self.storage.exists(GUARD) else None

    def best_version(self) -> dict[str, Any] | None:
        """Return version, fingerprint and score of the weights in `best/`; None if there are none."""
        return read_json(self.best, BEST, BEST_KEYS) if self.best.exists(BEST) else None

    def write_watchdog(self, dump: str) -> None:
        """Write the dump of a run that the watchdog ended."""
        self.storage.write(WATCHDOG, dump.encode())

    def asked(self) -> dict[str, int]:
        """Return the numbers of workers that `ddpo scale` has requested, by role. Raise ValueError if unreadable."""
        try:
            return ASKED.validate_json(self.storage.read(CONTROL))
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise ValueError(
                f"{self.location}/{CONTROL} cannot be used: it must be a JSON object with a number of workers, 1 or "
                f"more, for each role, as ddpo scale writes it ({error.errors()[0]['msg']})"
            ) from None

    def ask(self, wanted: dict[str, int]) -> None:
        """Request numbers of workers, by role. The driver checks about once a second."""
        self.storage.write(CONTROL, json.dumps({**self.asked(), **wanted}).encode())

    def recipe_tables(self) -> dict[str, Any]:
        """Return the tables of the run's recipe."""
        with reading(f"{self.location}/{self.recipe}"):
            return tomllib.loads(read_text(self.storage, self.recipe))

    def refuse_if_no_run(self, said_by: str = "") -> None:
        """Raise ValueError if there is no run here. `said_by` is the beginning of the message."""
        path = self.storage.local_path
        if path and not path.exists():
            raise ValueError(f"{said_by}{self.location} is no run's folder: there is no such folder")
        if not self.storage.exists(self.recipe):
            why = _not_a_run(path) if path else f"it has no {self.recipe}"
            raise ValueError(f"{said_by}{self.location} is no run's folder: {why}")

    def load_recipe(self, overrides: list[str]) -> Recipe:
        """Return the run's recipe with overrides. Raise ValueError if there is no run."""
        self.refuse_if_no_run()
        find_code(self.storage)
        return Recipe.from_toml(read_text(self.storage, self.recipe), f"{self.location}/{self.recipe}", overrides)


def _looks_like_a_run(path: Path) -> bool:
    return all((path / name).is_file() for name in (RECIPE_FILE, BASE_FILE))


def _not_a_run(path: Path) -> str:
    """Return why a path is not a run, and which run is probably meant."""
    around = next(filter(_looks_like_a_run, path.parents), None)
    inside = sorted(file.parent for file in path.glob(f"*/{RECIPE_FILE}") if _looks_like_a_run(file.parent))
    if around:
        return f"it is inside one: give {around}"
    if path.suffix == ".toml":
        return "it is a recipe: give the folder that its run is kept in, output_dir/name"
    if path.is_file():
        return "it is a file"
    return f"it has no {RECIPE_FILE}" + (f", but holds runs, such as {inside[0]}: give one of them" if inside else "")


@contextmanager
def weights_here(location: str) -> Iterator[Path]:
    """Yield a local path to the weights of a run, or to a LoRA's folder or file. Remote weights are downloaded."""
    if "://" not in location:
        yield Path(location)
        return
    storage = Storage(location)
    folders = [name for name in WEIGHTS if storage.exists(name)]
    with tempfile.TemporaryDirectory() as scratch:
        for name in folders:
            storage.copy_out(name, Path(scratch))
        if not folders:
            folder, _, name = location.rstrip("/").rpartition("/")
            Storage(folder).copy_out(name, Path(scratch))
        yield Path(scratch) if folders else Path(scratch) / storage.name


def without_none(value: Any) -> Any:
    """Leave out keys that are None, because TOML has no null. An absent key has its default."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value
