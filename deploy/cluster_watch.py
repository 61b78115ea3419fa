"""ClusterWatch: notices that the Ray cluster is lost before Ray ends the process for it, from C++ and with a dump of its own."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayError

POLL_SECONDS = 0.2
NODES_SECONDS = 5.0  # between two questions to the GCS, which counts requests
CONNECT_SECONDS = 5.0
# A driver waits so long for a GCS that comes back, as one with fault tolerance does; then Ray ends the process.
RAYS_PATIENCE_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 (Ray's name)


class ClusterWatch:
    """Looks at the GCS and at this node's raylet from threads of its own, as long as the process lives.

    The GCS of a cluster that was started elsewhere may be restarted: it is given half of the time that Ray itself waits.
    """

    def __init__(self, on_loss: Callable[[str], None], own_cluster: bool) -> None:
        """Call `on_loss` once, from a thread, with what is lost."""
        self._on_loss = on_loss
        self._patience = 0.0 if own_cluster else RAYS_PATIENCE_SECONDS / 2
        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        host, _, port = context.gcs_address.rpartition(":")
        self._gcs = (host, int(port))
        (node,) = [each for each in ray.nodes() if each["NodeID"] == self._node]
        self._raylet = (node["NodeManagerAddress"], node["NodeManagerPort"])
        self._noticed = threading.Event()
        for work in (self._watch_ports, self._watch_node):
            threading.Thread(target=work, name="cluster-watch", daemon=True).start()

    def _watch_ports(self) -> None:
        reached = time.monotonic()
        while not self._noticed.wait(POLL_SECONDS):
            if _answers(self._gcs):
                reached = time.monotonic()
            elif time.monotonic() - reached > self._patience:
                self._notice("its GCS ({}:{}) is gone".format(*self._gcs))
            if not _answers(self._raylet):
                self._notice("this machine's raylet ({}:{}) is gone".format(*self._raylet))

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


def _answers(address: tuple[str, int]) -> bool:
    """Return whether anybody listens there. A process that is suspended still does."""
    try:
        socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
