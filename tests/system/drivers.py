"""Drivers in separate processes, as a user starts them, and the processes that must end with them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import tomli_w

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests.system.disturbances import alive, title_of, wait_until

LONGEST_SECONDS = 300.0
GONE_SECONDS = 60.0


class Driver:
    """`ddpo train` on a recipe, with a local cluster of its own unless `address` names one."""

    def __init__(self, recipe: Recipe, folder: Path, *options: str, address: str | None = None) -> None:
        file = folder / f"{recipe.name}.toml"
        file.write_text(tomli_w.dumps(without_none(recipe.model_dump(exclude_defaults=True))))
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        self.output = folder / f"{recipe.name}.log"
        command = [sys.executable, "-m", "ray_ddpo", "train", str(file), *options]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def family(self) -> list[psutil.Process]:
        """Every process that it has started, directly or not, and that lives."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def ended(self) -> int:
        """Wait for it; its exit code."""
        return self.process.wait(timeout=LONGEST_SECONDS)

    def said(self) -> str:
        """All that it wrote."""
        return self.output.read_text(errors="replace")


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """TimeoutError: some are still there."""
    try:
        wait_until(lambda: not alive(processes), "the end of all processes", GONE_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"still there: {[title_of(each)[:200] for each in alive(processes)]}") from error


def committed_fingerprint(recipe: Recipe) -> str:
    """Of the weights in a finished run's last checkpoint."""
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None and newest.name == f"round-{recipe.rounds:06d}"
    return load_checkpoint(newest).learner.trained.fingerprint
