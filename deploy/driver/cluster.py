"""Connect to the Ray cluster that RAY_ADDRESS names, or say in one line which variable prevents it."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray

from ray_ddpo.common.model_files.model_hub import first_line
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import elastic_roles
from ray_ddpo.deploy.driver.supervision import Stopped

PROBE_SECONDS = 5.0
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # limit of the operating system for a socket's path
LONGEST_SOCKET = "ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # below the temporary folder
TEMPORARY = ("RAY_TMPDIR", "TMPDIR")  # where Ray looks for a temporary folder, in this order
LOCAL = "local"


def attaches() -> bool:
    """Return whether this process is to attach to a cluster that RAY_ADDRESS names."""
    return os.environ.get("RAY_ADDRESS", LOCAL) not in ("", LOCAL)


@contextmanager
def stopping_what_it_started() -> Iterator[None]:
    """Leave Ray as it was: disconnect from a cluster that the body has started or joined when the body ends."""
    stays = ray.is_initialized()
    try:
        yield
    except Stopped as stopped:
        stays = stays or stopped.cluster_is_lost  # Ray's shutdown could hang
        raise
    finally:
        if not stays and ray.is_initialized():
            ray.shutdown()


def has_cores_to_overlap(recipe: Recipe) -> bool:
    """Return whether samplers, reward workers and learner can work at the same time.

    A remote cluster is taken to be able.
    """
    asked = recipe.learner.num_cpus * recipe.learner.world_size
    asked += sum(table.num_cpus * table.count for table in elastic_roles(recipe).values())
    return attaches() or asked <= (os.cpu_count() or 1)


def attach(**options: Any) -> None:
    """Attach to the cluster of RAY_ADDRESS.

    Raises:
        ValueError: no cluster answers there, or the cluster refuses.
    """
    address = os.environ["RAY_ADDRESS"]
    try:
        if address != "auto":
            _probe(address)
        _init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise ValueError(
            f"the cluster of RAY_ADDRESS {address!r} cannot be reached: {first_line(error)}; give auto or the "
            "head's host:6379, see that it runs and that both sides agree on the token (export RAY_AUTH_MODE=token), "
            "or unset RAY_ADDRESS to start a cluster on this machine"
        ) from error


def start_here(num_cpus: int) -> None:
    """Start a cluster on this machine.

    Raises:
        ValueError: sockets or files of the cluster cannot be created, or its processes do not start in time.
    """
    check_temporary_folder()
    try:
        _init(address=LOCAL, num_cpus=num_cpus, log_to_driver=True)
    except (OSError, RuntimeError) as error:
        ray.shutdown()
        raise ValueError(
            f"Ray cannot be started on this machine: {first_line(error)}; its files are in "
            f"{_temporary_folder()}/ray, and RAY_TMPDIR names another folder; if processes did not start in time, try again "
            "when the machine is less busy, or train with --serial, which needs no Ray"
        ) from error


def _init(**options: Any) -> None:
    """Call `ray.init`. Raise RuntimeError where Ray raises a bare Exception: its processes did not start in time."""
    try:
        ray.init(**options)
    except Exception as error:  # noqa: BLE001
        if type(error) is Exception:
            raise RuntimeError(first_line(error)) from error
        raise


def check_temporary_folder() -> None:
    """Check that Ray can create sockets in its temporary folder. Raise ValueError if the folder's path is too long."""
    folder = _temporary_folder()
    path = f"{folder.rstrip('/')}/{LONGEST_SOCKET}"
    if len(os.fsencode(path)) > SOCKET_BYTES:
        variable = next(name for name in TEMPORARY if name in os.environ)
        most = SOCKET_BYTES - len(LONGEST_SOCKET) - 1
        raise ValueError(
            f"{variable} is {folder!r}, too long a path for Ray's sockets: it may have {most} bytes and has "
            f"{len(os.fsencode(folder))}; export RAY_TMPDIR=/tmp"
        )


def _temporary_folder() -> str:
    return next((os.environ[name] for name in TEMPORARY if name in os.environ), "/tmp")


def _probe(address: str) -> None:
    """Connect once, because Ray would retry for many minutes if no process listens."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), PROBE_SECONDS).close()
