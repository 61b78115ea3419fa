"""A local Ray cluster for tests, and queries of a run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import ray
import torch

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.system.forked_workers import forked_workers, forking_process

MARK = "of_the_tests"  # a resource of the tests' own cluster


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[str]:
    """Short, because a socket's path may have 107 bytes."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with forking_process(folder):
        yield folder
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(cluster_folder: str) -> None:
    """One cluster with eight CPUs for all tests, started again if a test has left or replaced it."""
    if ray.is_initialized() and ray.cluster_resources().get(MARK):
        return
    ray.shutdown()
    os.environ.pop("RAY_ADDRESS", None)
    # A process that has looked for a GPU cannot be forked for work on one.
    with nullcontext() if torch.cuda.is_available() else forked_workers():
        ray.init(
            address="local",
            num_cpus=8,
            resources={MARK: 1},
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=cluster_folder,
        )


def final_fingerprint(recipe: Recipe, **how: bool) -> str:
    """Run a recipe to its end; the fingerprint of the weights in its last checkpoint."""
    run_training(recipe, **how)
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None and newest.name == f"round-{recipe.rounds:06d}"
    return load_checkpoint(newest).learner.trained.fingerprint
