"""ClusterWatch: notices that the Ray cluster is lost before Ray ends the process for it, from C++ and with a dump of its own."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayError

POLL_SECONDS = 0.5
NODES_SECONDS = 5.0  # between two questions to the GCS, which counts requests
CONNECT_SECONDS = 5.0
# For so long a GCS with fault tolerance may be away, and a process suspended: half of what Ray waits until it ends the driver.
PATIENCE_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60")) / 2  # noqa: SIM112 (Ray's name)


class ClusterWatch:
    """Looks at the GCS and at this node's raylet from threads of its own, as long as the run lasts.

    The GCS of a cluster that was started elsewhere may be restarted. Any other process that refuses connections is gone.
    """

    def __init__(self, on_loss: Callable[[str], None], own_cluster: bool) -> None:
        """Call `on_loss` once, from a thread, with what is lost."""
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
        reached = {what: time.monotonic() for what, _, _ in self._watched}
        while not self._noticed.wait(POLL_SECONDS):
            for what, address, patience in self._watched:
                try:
                    socket.create_connection(address, timeout=CONNECT_SECONDS).close()
                    reached[what] = time.monotonic()
                    continue
                except ConnectionRefusedError:
                    allowed = patience
                except OSError:  # no answer at all: a machine that is gone, or a process that has not accepted for long
                    allowed = PATIENCE_SECONDS
                if time.monotonic() - reached[what] > allowed:
                    self._notice("{} ({}:{}) is gone".format(what, *address))

    def _watch_node(self) -> None:
        """See whether the GCS still counts this node among the living; in a thread of its own, because the question may hang."""
        while not self._noticed.wait(NODES_SECONDS):
            with contextlib.suppress(ValueError, RayError):  # Ray is shut down, or the GCS is on its way out
                alive = {each["NodeID"]: each["Alive"] for each in ray.nodes()}
                if ray.is_initialized() and not alive.get(self._node, False):
                    self._notice("its GCS has given this machine up, whose raylet did not answer for too long")

    def _notice(self, what: str) -> None:
        if ray.is_initialized() and not self._noticed.is_set():
            self._noticed.set()
            self._on_loss(what)

    def stop(self) -> None:
        """Stop looking, before the cluster is closed."""
        self._noticed.set()
