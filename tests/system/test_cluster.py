"""A job on a cluster of several nodes with disturbances, seen by Prometheus and the dashboard."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import rounds_done
from tests.system.drivers import committed_fingerprint
from tests.system.prometheus import Prometheus, prometheus
from tests.system.started_nodes import StartedCluster, StartedNode, started_cluster
from tests.system.submitted_run import PLACES, RECIPE, ROOT, ROUNDS, SHORT_FORM, Story, first_job, second_job

pytestmark = pytest.mark.system
DASHBOARD = json.loads((ROOT / "deploy" / "cluster" / "grafana" / "ray_ddpo.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[StartedCluster, list[StartedNode]]]:
    """A head, a node for learner, driver and reward workers, and two for a sampler each."""
    with started_cluster() as cluster:
        cluster.join(3, learner=1, reward=4, driver=1)
        samplers = [cluster.join(1, sampler=1) for _ in range(2)]
        cluster.wait_for(lambda: cluster.living_nodes() == 4, "four nodes")
        yield cluster, samplers


@pytest.fixture(scope="module")
def watching(nodes: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with prometheus(nodes[0].discovery, tmp_path_factory.mktemp("prometheus")) as asked:
        yield asked


@pytest.fixture(scope="module")
def story(
    nodes: tuple[StartedCluster, list[StartedNode]], watching: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    cluster, samplers = nodes
    folder = tmp_path_factory.mktemp("shared")
    told = Story(Recipe.load(ROOT / RECIPE, ["--output_dir", str(folder / "runs"), *SHORT_FORM, *PLACES]))
    first_job(cluster, samplers, told, tmp_path_factory.mktemp("dashboard"))
    second_job(cluster, told)
    print("\n" + ", ".join(f"{what} after {seconds:.0f} s" for what, seconds in told.seconds.items()), file=sys.stderr)
    return told


def test_a_run_continues_when_a_samplers_node_is_lost(story: Story) -> None:
    assert story.rounds_when_stopped >= story.rounds_when_killed + 3


def test_a_stopped_job_has_committed_its_last_round(story: Story) -> None:
    assert [job["status"] for job in story.jobs] == ["STOPPED", "SUCCEEDED"]
    assert story.committed_when_stopped >= story.rounds_when_stopped > 0
    assert not story.lease_was_left


def test_a_resubmitted_job_resumes_the_run(story: Story) -> None:
    assert f"from round {story.committed_when_stopped + 1}," in story.said[1], story.said[1]
    assert story.exit_codes[1] == 0 and rounds_done(story.run) == ROUNDS


def test_the_weights_are_those_of_a_run_in_one_process_that_nothing_befell(story: Story, tmp_path: Path) -> None:
    calm = Recipe.load(ROOT / RECIPE, ["--output_dir", str(tmp_path), *SHORT_FORM])
    assert committed_fingerprint(story.recipe) == final_fingerprint(calm, serial=True)


def test_driver_and_learner_are_where_no_sampler_is(story: Story) -> None:
    assert len(story.seen.nodes["Learner"] | story.seen.nodes["JobSupervisor"] | story.seen.nodes["RewardWorker"]) == 1
    assert len(story.seen.nodes["Sampler"]) == 2 and not story.seen.nodes["Sampler"] & story.seen.nodes["Learner"]


def test_actors_are_named_by_run_and_role_and_say_what_they_hold(story: Story) -> None:
    expected = {
        "tiny_jpeg/learner-0": "Learner of tiny_animals by ddpo_is on cpu",
        "tiny_jpeg/sampler-0": "Sampler of tiny_animals on cpu",
        "tiny_jpeg/sampler-1": "Sampler of tiny_animals on cpu",
        "tiny_jpeg/reward-worker-0": "RewardWorker of jpeg_compressibility on cpu",
        "tiny_jpeg/scorer-0": "RewardWorker of animal_classifier on cpu",
    }
    assert {name: says for name, says in story.seen.actors.items() if name.startswith("tiny_jpeg/")} == expected


def test_tasks_name_what_is_sampled_scored_and_trained_on(story: Story) -> None:
    expected = {
        "Sampler: sample round 0, task 0 (version 0)": "Sampler.sample",
        "Sampler: sample evaluation of version 0, task 0": "Sampler.sample",
        "RewardWorker: score round 0, task 0 (version 0), images 0-3": "RewardWorker.score",
        "Learner: learn from round 0": "Learner.lead",
    }
    assert {name: story.seen.tasks.get(name) for name in expected} == expected


def test_no_task_has_a_series_of_its_own(story: Story, watching: Prometheus) -> None:
    """As deploy/cluster/prometheus.yaml has it: there would be several for every task that is sampled."""
    names = watching.asked("label/Name/values", start=story.start, end=story.end)
    assert "object_store_memory" in names
    assert [name for name in names if ": " in name] == []


def test_the_dashboards_pages_show_the_run_and_what_it_does(story: Story) -> None:
    assert {name: page.found for name, page in story.seen.pages.items()} == dict.fromkeys(
        ("jobs", "job", "actors", "actor"), True
    )
    assert "\ttiny_jpeg\t" in story.seen.pages["jobs"].text and '"rounds": "10"' in story.seen.pages["job"].text


# What has no series here, and why; the query itself must still be one that Prometheus can read.
NO_DATA = {
    "ray_node_gpus_utilization": "this machine has no GPU",
    "ray_node_gram_used": "this machine has no GPU",
    "ray_ddpo_masked_fraction": "this algorithm leaves no pair out",
    "ray_memory_manager_worker_eviction_total": "nothing ran out of memory",
    "ray_node_manager_unexpected_worker_failure_total": "no process died of a node that lived",
    "ray_ddpo_images_dropped_total": "every image could be scored",
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_has_data(story: Story, watching: Prometheus, query: str) -> None:
    filled_in = query.replace("$run", "tiny_jpeg").replace("$session", ".*")
    found = watching.seen(filled_in, story.start, story.end)
    reasons = [reason for metric, reason in NO_DATA.items() if metric in query and " or " not in query]
    assert bool(found) != bool(reasons), reasons or query


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/actors", "/nodes?view=summary", "/api/cluster_status"])
@pytest.mark.parametrize(("headers", "code"), [({}, 401), ({"Authorization": f"Bearer {'0' * 64}"}, 403)])
def test_without_the_token_every_request_is_refused(
    nodes: tuple, path: str, headers: dict[str, str], code: int
) -> None:
    cluster: StartedCluster = nodes[0]
    assert cluster.get(path)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(cluster.api + path, headers=headers), timeout=30)
    assert refused.value.code == code
