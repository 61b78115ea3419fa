"""A local Ray cluster of the tests' own, and what the tests ask of a run."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray

from common.config import Recipe
from common.run_folder import RunFolder
from learner.checkpoint import load_checkpoint, newest_checkpoint
from train import train


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Eight slots on however many cores; its folder is short, because a socket's path may have 107 bytes."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def final_fingerprint(recipe: Recipe, **how: bool) -> str:
    """Run a recipe to its end; the fingerprint of the weights in its last checkpoint."""
    train(recipe, **how)
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None and newest.name == f"round-{recipe.rounds:06d}"
    return load_checkpoint(newest).learner.trained.fingerprint
