"""The Grafana dashboard: its queries ask for metrics that exist, and its panels can be read."""

import itertools
import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_ddpo.common.trackers.ray_metrics import TAGS
from tests.deploy.lint import tool

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "cluster" / "grafana" / "ray_ddpo.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
# Ray's own, and their labels, as Ray's default dashboard asks for them.
OF_RAY = {
    "ray_memory_manager_worker_eviction_total",
    "ray_node_manager_unexpected_worker_failure_total",
    "ray_object_store_memory",
    "ray_resources",
    "ray_node_mem_used_host",
    "ray_node_mem_total_host",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_cpu_utilization",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
}
LABELS_OF_RAY = {"SessionName", "instance", "Location", "Name", "GpuIndex", "GpuDeviceName"}
RAYS_PANELS = "dashboard/modules/metrics/dashboards/default_dashboard_panels.py"
ASKED_FOR = {
    *("ray_ddpo_reward_mean", "ray_ddpo_reward_std", "ray_ddpo_kl_nats", "ray_ddpo_clip_fraction"),
    *("ray_ddpo_idle_sampler", "ray_ddpo_idle_reward_worker", "ray_ddpo_idle_learner"),
    *("ray_ddpo_tasks_inflight", "ray_ddpo_tasks_ready", "ray_ddpo_lag_max_last"),
    *("ray_ddpo_evaluation_reward_mean", "ray_ddpo_guard_alarms", "ray_ddpo_kl_reference_nats"),
    *("ray_ddpo_actor_restarts_total", "ray_ddpo_retries_total", "ray_ddpo_images_dropped_total"),
    *("ray_object_store_memory", "ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_mem_used_host"),
}


def of_the_program() -> dict[str, set[str]]:
    """Return the names of docs/metrics.md as Ray exports them, with their tags. `reward` is always evaluated."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").replace("<score>", "reward")
    cells = [line.rsplit("|", 2)[1] for line in page.splitlines() if line.startswith("| `")]
    found = {}
    for cell in cells:
        for name, tag, histogram in re.findall(r"`(ray_ddpo_\w+)(?:\{(\w+)\})?`( \(histogram\))?", cell):
            for part in ("_bucket", "_sum", "_count") if histogram else ("",):
                found[name + part] = {*TAGS, *([tag] if tag else [])}
    return found


def metrics_in(query: str) -> set[str]:
    """By their names; of metrics that are asked for by a pattern, those of the program that it fits."""
    patterns = re.findall(r'__name__=~"([^"]*)"', query)
    named = set(re.findall(r"\bray_\w+", re.sub(r'__name__=~"[^"]*"', "", query)))
    return named.union(*({name for name in of_the_program() if re.fullmatch(each, name)} for each in patterns))


def labels_in(query: str) -> set[str]:
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}
    return (grouped | set(re.findall(r"(\w+)=~?\"", query))) - {"__name__"}


def test_the_dashboard_shows_what_it_is_asked_for() -> None:
    assert ASKED_FOR - set().union(*map(metrics_in, QUERIES)) == set()


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_metrics_and_labels_that_exist(query: str) -> None:
    program = of_the_program()
    assert len(program) > 40
    metrics = metrics_in(query)
    assert metrics and metrics <= set(program) | OF_RAY
    allowed = set().union(*(program.get(metric, LABELS_OF_RAY) for metric in metrics))
    assert labels_in(query) <= allowed


def test_the_metrics_of_ray_are_those_of_the_ray_that_is_installed() -> None:
    found = find_spec("ray")
    assert found and found.origin
    asked = (Path(found.origin).parent / RAYS_PANELS).read_text()
    assert {metric for metric in OF_RAY if f"{metric}{{" not in asked} == set()
    assert {label for label in LABELS_OF_RAY - {"SessionName"} if not re.search(rf"\b{label}\b", asked)} == set()


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_keeps_to_the_runs_or_clusters_that_are_chosen(query: str) -> None:
    selectors = re.findall(r"ray_\w+(\{[^}]*\})|(?<!\w)(\{__name__[^}]*\})", query)
    selectors = ["".join(found) for found in selectors]
    assert len(selectors) >= len(re.findall(r"\{", query))
    assert all('run=~"$run"' in selector or 'SessionName=~"$session"' in selector for selector in selectors)


def test_every_variable_that_is_used_is_there() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "run", "session"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) == set(variables)
    assert variables["datasource"]["type"] == "datasource"
    for name in ("run", "session"):
        assert metrics_in(variables[name]["definition"]) <= set(of_the_program()) | OF_RAY
        assert variables[name]["definition"] == variables[name]["query"]["query"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 20 and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert {panel["datasource"]["uid"], *(one["datasource"]["uid"] for one in panel["targets"])} == {"${datasource}"}
    names = [target["refId"] for target in panel["targets"]]
    assert names and len(set(names)) == len(names)
    assert all(target["legendFormat"] for target in panel["targets"])


def test_every_panel_has_a_number_and_a_place_of_its_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: list[set[tuple[int, int]]] = []
    for place in (panel["gridPos"] for panel in panels):
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        taken.append(set(itertools.product(columns, range(place["y"], place["y"] + place["h"]))))
    assert sum(map(len, taken)) == len(set().union(*taken))


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((ROOT / "deploy" / "cluster" / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_prometheus_accepts_its_configuration_and_every_query(tmp_path: Path) -> None:
    promtool = tool("promtool")
    filled_in = [query.replace("$run", ".*").replace("$session", ".*") for query in QUERIES]
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(filled_in)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    nodes = tmp_path / "nodes.json"  # in place of the file that Ray writes, which must exist
    nodes.write_text("[]")
    config = (ROOT / "deploy" / "cluster" / "prometheus.yaml").read_text()
    (tmp_path / "config.yaml").write_text(re.sub(r"/tmp/ray/\w+\.json", str(nodes), config))
    for check in (("config", tmp_path / "config.yaml"), ("rules", tmp_path / "rules.yaml")):
        done = subprocess.run([promtool, "check", *check], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
