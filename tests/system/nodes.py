"""A cluster of several nodes on this machine, and the spilled bytes of its object stores."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._common.utils import get_ray_address_file
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster


@contextmanager
def local_nodes(dashboard: bool = False) -> Iterator[Cluster]:
    """A head without CPUs for actors; the test adds nodes. Its folder is short, because a socket's path must be.

    `dashboard`: jobs can be submitted to it.
    """
    folder = tempfile.mkdtemp(prefix="n", dir="/tmp")
    # Wherever its folder is, a Cluster writes its address here, and does not make the place.
    os.makedirs(os.path.dirname(get_ray_address_file(None)), exist_ok=True)
    # Ports of its own: a job's agent does not come up on one that another cluster of this machine has.
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()} if dashboard else {}
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": dashboard,
            "object_store_memory": 100_000_000,
            "temp_dir": folder,
            **ports,
        },
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def spilled_bytes() -> int:
    """What the stores of the cluster that this process is attached to have written to disk so far."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.spilled_bytes_total


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
