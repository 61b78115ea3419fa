"""ClusterWatch: notice a lost Ray cluster before Ray ends the process from C++ with a stack dump."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayError

POLL_SECONDS = 0.5
NODES_SECONDS = 5.0  # between two requests to the GCS, whose load grows with every request
CONNECT_SECONDS = 5.0
# How long a fault-tolerant GCS may be away, or a process suspended: half of the time after which Ray ends the driver.
PATIENCE_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60")) / 2  # noqa: SIM112


class ClusterWatch:
    """A watch over the GCS and this node's raylet, in threads, for the duration of a run.

    The GCS of a cluster started elsewhere may be restarted. Any other process that refuses connections is lost.
    """

    def __init__(self, on_loss: Callable[[str], None], own_cluster: bool) -> None:
        """Start the threads; they call `on_loss` once, with the lost process in words."""
        self._on_loss = on_loss
        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        host, _, port = context.gcs_address.rpartition(":")
        (node,) = [each for each in ray.nodes() if each["NodeID"] == self._node]
        self._watched = (
            ("its GCS", (host, int(port)), 0.0 if own_cluster else PATIENCE_SECONDS),
            ("this machine's raylet", (node["NodeManagerAddress"], node["NodeManagerPort"]), 0.0),
        )
        self._noticed = threading.Event()
        for work in (self._watch_ports, self._watch_node):
            threading.Thread(target=work, name="cluster-watch", daemon=True).start()

    def _watch_ports(self) -> None:
        """Connect to the ports of GCS and raylet regularly, and report a process that stays unreachable."""
        reached = {what: time.monotonic() for what, _, _ in self._watched}
        while not self._noticed.wait(POLL_SECONDS):
            for what, address, patience in self._watched:
                try:
                    socket.create_connection(address, timeout=CONNECT_SECONDS).close()
                    reached[what] = time.monotonic()
                    continue
                except ConnectionRefusedError:
                    allowed = patience
                except OSError:  # no answer: the machine is gone, or the process has not accepted for long
                    allowed = PATIENCE_SECONDS
                if time.monotonic() - reached[what] > allowed:
                    self._notice("{} ({}:{}) is gone".format(what, *address))

    def _watch_node(self) -> None:
        """Ask the GCS regularly whether this node is alive. A separate thread, because the request may hang."""
        while not self._noticed.wait(NODES_SECONDS):
            with contextlib.suppress(ValueError, RayError):  # Ray is shut down, or the GCS is ending
                alive = {each["NodeID"]: each["Alive"] for each in ray.nodes()}
                if ray.is_initialized() and not alive.get(self._node, False):
                    self._notice("its GCS has given this machine up, whose raylet did not answer for too long")

    def _notice(self, what: str) -> None:
        if ray.is_initialized() and not self._noticed.is_set():
            self._noticed.set()
            self._on_loss(what)

    def stop(self) -> None:
        """Stop watching, before the cluster is shut down."""
        self._noticed.set()
