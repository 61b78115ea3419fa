"""Debian's Prometheus beside a test cluster, with the configuration of deploy/."""

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.lint import tool
from tests.system.disturbances import wait_until
from tests.system.started_nodes import free_ports

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "cluster" / "prometheus.yaml"
START_SECONDS = 60.0


class Prometheus:
    """One that scrapes, and answers queries."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        """Whether it takes queries yet."""
        try:
            return urllib.request.urlopen(f"{self._address}/-/ready", timeout=5).status == 200
        except OSError:
            return False

    def asked(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its API. HTTPError: it refuses, such as a query that it cannot read."""
        words = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._address}/api/v1/{path}?{words}", timeout=30) as answer:
            return json.load(answer)["data"]

    def seen(self, query: str, start: float, end: float) -> list[dict[str, Any]]:
        """The series that a query gives anywhere between two moments, second by second."""
        return self.asked("query_range", query=query, start=start, end=end, step=1)["result"]


@contextmanager
def prometheus(discovery: Path, folder: Path) -> Iterator[Prometheus]:
    """One that reads the file in which Ray lists its nodes, every second, so that a short run is seen."""
    program = tool("prometheus")
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = configuration["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "1s"}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    port = free_ports(("web",))["web"]
    flags = [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'series'}"]
    with (folder / "prometheus.log").open("wb") as output:
        process = subprocess.Popen(
            [program, *flags, f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        asked = Prometheus(port)
        wait_until(lambda: asked.is_ready() or process.poll() is not None, "Prometheus", START_SECONDS)
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield asked
    finally:
        process.terminate()
        process.wait(START_SECONDS)
