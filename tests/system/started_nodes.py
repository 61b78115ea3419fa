"""A cluster as an operator starts it, with one `ray start` a node, and the answers of its job API."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.system.disturbances import alive, wait_until

BIN = Path(sys.executable).parent
STORE_BYTES = 100_000_000
START_SECONDS = 180.0
# Ray's defaults are long for a test: metrics every ten seconds, and a dead node is noticed after fifteen.
SOON = {"RAY_metrics_report_interval_ms": "1000", "RAY_health_check_period_ms": "500"}
# What two nodes of one machine would otherwise both want. Workers take any port that is free.
PORTS = (
    *("--node-manager-port", "--object-manager-port", "--metrics-export-port"),
    *("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port"),
)
PORTS_OF_A_HEAD = (*PORTS, "--port", "--ray-client-server-port", "--dashboard-port")


class StartedNode:
    """One `ray start --block`. All processes of the node are its children, so that it can be killed like a machine."""

    def __init__(self, options: list[str], ports: dict[str, int], folder: Path) -> None:
        numbers = [word for option, port in ports.items() for word in (option, str(port))]
        numbers += ["--min-worker-port", "0", "--max-worker-port", "0"]
        self.killed = False
        self.output = Path(tempfile.mkstemp(suffix=".log", dir=folder)[1])
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [BIN / "ray", "start", "--block", "--disable-usage-stats", *options, *numbers],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=node_environment(),
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """All that it is made of now, workers and jobs too."""
        try:
            mother = psutil.Process(self.process.pid)
            return [mother, *mother.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to all of it at once, as if the machine's power had gone."""
        self.killed = True
        processes = self.processes()
        for act in ("suspend", "kill"):  # first all are held, or one would see another's end and do something about it
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(process, act)()
        self.process.wait(START_SECONDS)


class StartedCluster:
    """A head that only drives, and the nodes that have joined it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: list[StartedNode] = []
        ports = free_ports(PORTS_OF_A_HEAD)
        self.address = f"127.0.0.1:{ports['--port']}"
        self.api = f"http://127.0.0.1:{ports['--dashboard-port']}"
        head = ["--head", "--num-cpus", "0", "--dashboard-host", "127.0.0.1"]
        self.head = self._started([*head, "--object-store-memory", str(STORE_BYTES)], ports)
        self.wait_for(self._answers, "the head's job API")

    def join(self, num_cpus: int, **resources: float) -> StartedNode:
        """Start a node that has so many CPUs and these resources."""
        options = ["--address", self.address, "--num-cpus", str(num_cpus), "--resources", json.dumps(resources)]
        return self._started([*options, "--object-store-memory", str(STORE_BYTES)], free_ports(PORTS))

    @property
    def discovery(self) -> Path:
        """Where the head writes for Prometheus which nodes there are: in its --temp-dir, the first one's."""
        return self.folder / "0" / "prom_metrics_service_discovery.json"

    def _started(self, options: list[str], ports: dict[str, int]) -> StartedNode:
        # A folder for each: nodes that start at the same moment in one would give their sockets the same names.
        folder = self.folder / str(len(self._nodes))
        options = [*options, "--node-ip-address", "127.0.0.1", "--temp-dir", str(folder)]
        self._nodes.append(StartedNode(options, ports, self.folder))
        return self._nodes[-1]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Until it is so, or a node did not start, which is shown."""
        wait_until(lambda: bool(self._ended()) or condition(), what, START_SECONDS)
        assert not self._ended(), self._ended()[0].output.read_text()

    def _ended(self) -> list[StartedNode]:
        return [node for node in self._nodes if node.process.poll() is not None and not node.killed]

    def _answers(self) -> bool:
        try:
            return bool(self.get("/api/version"))
        except OSError:
            return False

    def get(self, path: str) -> Any:
        """What the head answers to a request with the cluster's token. HTTPError: it refuses."""
        request = urllib.request.Request(self.api + path, headers={"Authorization": f"Bearer {cluster_token()}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def listed(self, what: str, **filters: str) -> list[dict[str, Any]]:
        """The state API's rows of `actors`, `tasks` or `nodes`, as the dashboard has them."""
        words = "".join(
            f"&filter_keys={key}&filter_predicates=%3D&filter_values={value}" for key, value in filters.items()
        )
        answer = self.get(f"/api/v0/{what}?detail=1&limit=10000{words}")
        return answer["data"]["result"]["result"]

    def job_log(self, submission_id: str) -> str:
        """Return the output of a job's driver from any node, because here all nodes have the driver's address."""
        logs = self.folder.glob(f"*/session_latest/logs/job-driver-{submission_id}.log")
        return max((log.read_text(errors="replace") for log in logs), key=len)

    def living_nodes(self) -> int:
        """How many nodes the head counts, itself among them."""
        return len(self.listed("nodes", state="ALIVE"))

    def close(self) -> None:
        """End every process of every node; the head last, so that none asks for it in vain."""
        processes = [process for node in self._nodes for process in node.processes()]
        for node in reversed(self._nodes):
            node.kill()
        for process in alive(processes):
            process.kill()


@contextmanager
def started_cluster() -> Iterator[StartedCluster]:
    """A head alone; nodes are joined by the test. Its folder is short, because a socket's path must be."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    cluster = None
    try:
        cluster = StartedCluster(folder)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def node_environment() -> dict[str, str]:
    """Return the environment of a node and its jobs: this environment's programs, the token's file, no cluster."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**environment, **SOON, "PATH": path}


def cluster_token() -> str:
    """The token of every cluster of the tests, from its file."""
    return Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()


def free_ports(names: tuple[str, ...]) -> dict[str, int]:
    """A port for each name that nobody listens on now; held until all are found, so that no two are the same."""
    sockets = [socket.socket() for _ in names]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
    finally:
        for each in sockets:
            each.close()
