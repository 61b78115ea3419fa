"""Compare the files in deploy/cluster with the program, its versions and each other."""

import json
import os
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.plan.plan import plan
from tests.deploy.manifests import (
    DEPLOY,
    PINNED,
    PYPROJECT,
    README,
    ROOT,
    STANDARD,
    Machine,
    asked,
    document,
    machines_of_kuberay,
    machines_of_the_launcher,
    machines_of_the_readme,
    run_of_the_job,
    run_of_the_readme,
    run_of_the_readmes_tables,
    values,
)

YAML_FILES = sorted(path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*.yaml"))
MACHINES = {"KubeRay": machines_of_kuberay, "launcher": machines_of_the_launcher}


class NoKeyTwice(yaml.SafeLoader):
    """A key that stands twice in a mapping would silently win over the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{node.start_mark}: {keys}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("name", YAML_FILES)
def test_a_yaml_file_is_read_and_opens_with_what_it_is_for(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert text.startswith("# ") and isinstance(yaml.load(text, NoKeyTwice), dict)


def test_every_file_is_named_in_the_readme() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".py", ".toml", ".pyc")]
    files = [
        path for path in files if DEPLOY / "commands" not in path.parents
    ]  # what commands read is no file to deploy
    assert len(files) >= 11
    assert [path.name for path in files if path.name not in README and path.name != "README.md"] == []


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "../../docs/operating.md" in links
    assert [link for link in links if not (DEPLOY / link).exists()] == []


@pytest.mark.parametrize("name", YAML_FILES)
def test_versions_are_those_that_were_tested(name: str) -> None:
    tree = document(name)
    assert set(values(tree, "rayVersion")) <= {PINNED["ray"]}
    for image in values(tree, "image"):
        repository, _, tag = image.rpartition(":")
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), f"{image} is not pinned"
        assert tag == PYPROJECT["project"]["version"] or not repository.endswith("ray-ddpo")


def test_kuberay_names_the_version_of_ray_in_both_files() -> None:
    assert [len(values(document(f"kuberay/{name}.yaml"), "rayVersion")) for name in ("ray_job", "ray_cluster")] == [
        1,
        1,
    ]


def test_the_launchers_file_meets_its_schema() -> None:
    found = find_spec("ray")
    assert found and found.origin
    schema = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(document("ray_cluster.yaml"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document("ray_cluster.yaml"), "head_types": {}}, schema)


def test_one_run_and_a_cluster_that_stays_have_the_same_machines() -> None:
    job = document("kuberay/ray_job.yaml")["spec"]
    assert job["rayClusterSpec"] == document("kuberay/ray_cluster.yaml")["spec"]
    run = run_of_the_job()
    places = {"folder": run.run_path(), "report": f"{run.run_path()}/report/report.html"}
    assert job["metadata"] == {"job_name": run.name, "rounds": str(run.rounds), **places}
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def test_all_that_is_said_to_be_submitted_is_the_same_run() -> None:
    job, command, tables = run_of_the_job(), run_of_the_readme(), run_of_the_readmes_tables()
    assert job.run_path() == "/shared/runs/sd15_aesthetic"
    assert command.run_path() == "s3://BUCKET/runs/sd15_aesthetic"
    one = job.model_copy(update={"output_dir": "runs"})
    assert command.model_copy(update={"output_dir": "runs"}) == one == tables


@pytest.mark.parametrize("kind", MACHINES)
def test_each_role_of_the_run_has_a_place_and_only_there(kind: str) -> None:
    machines, recipe = MACHINES[kind](), run_of_the_job()
    beside = (recipe.learner, recipe.reward_workers, recipe.evaluation.workers)
    learners = [machine for machine in machines.values() if machine.holds(*beside)]
    samplers = [machine for machine in machines.values() if machine.holds(recipe.samplers)]
    assert [(machine.market, machine.fewest) for machine in learners] == [("on-demand", 1)]
    assert [(machine.market, machine.fewest) for machine in samplers] == [("spot", 0)]
    assert samplers[0].most >= (recipe.samplers.max or 0)


@pytest.mark.parametrize("kind", MACHINES)
def test_the_resources_of_the_machines_are_those_that_recipes_ask_for(kind: str) -> None:
    recipe = run_of_the_job()
    roles = (recipe.learner, recipe.samplers, recipe.reward_workers, recipe.evaluation.workers)
    custom = {name for role in roles for name in asked(role)} - STANDARD
    assert custom == {"learner", "sampler", "reward"}
    given = {name for machine in MACHINES[kind]().values() for name in machine.resources}
    custom |= {"driver"}  # for DRIVER_RESOURCES of submit.sh
    assert {name for name in given - STANDARD if not name.startswith("accelerator_type:")} == custom
    assert {name for resources in machines_of_the_readme().values() for name in resources} == custom


@pytest.mark.parametrize("kind", MACHINES)
def test_nothing_but_the_driver_has_a_place_on_the_head(kind: str) -> None:
    machines = MACHINES[kind]()
    (head,) = [machine for name, machine in machines.items() if name.startswith("head")]
    assert head.resources["CPU"] == 0 and "GPU" not in head.resources
    spot = [machine for machine in machines.values() if machine.market == "spot"]
    assert len(spot) == 2 and head not in spot


@pytest.mark.parametrize("kind", MACHINES)
def test_a_driver_that_is_not_on_the_head_is_where_nobody_takes_the_machine_away(kind: str) -> None:
    places = [machine for machine in MACHINES[kind]().values() if machine.resources.get("driver")]
    assert [(machine.market, machine.fewest) for machine in places] == [("on-demand", 1)]
    assert all("learner" in resources for resources in machines_of_the_readme().values() if "driver" in resources)


def test_a_machine_holds_only_what_it_has() -> None:
    machine = Machine({"CPU": 4, "GPU": 1, "learner": 1, "reward": 4, "accelerator_type:A100": 1}, None, 1, 1)
    learner = run_of_the_job().learner
    assert machine.holds(learner) and not machine.holds(learner, learner)
    assert not machine.holds(learner.model_copy(update={"accelerator_type": "H100"}))
    assert not machine.holds(learner.model_copy(update={"resources": {"sampler": 1.0}}))


def test_the_launcher_asks_for_a_token_and_opens_nothing() -> None:
    cluster = document("ray_cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]
    for name, node in cluster["available_node_types"].items():
        market = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert (market == "spot") == name.startswith("sampler")


def test_kuberay_asks_for_a_token_and_scales_by_what_is_asked_for() -> None:
    spec = document("kuberay/ray_cluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert not set(values(spec, "serviceType")) | set(values(spec, "enableIngress"))


def test_every_pod_writes_to_the_shared_volume_and_is_not_root() -> None:
    spec = document("kuberay/ray_cluster.yaml")["spec"]
    claim = document("kuberay/shared_storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert values(pod["volumes"], "claimName") == [claim["metadata"]["name"]]
        assert run_of_the_job().output_dir.startswith(container["volumeMounts"][0]["mountPath"] + "/")
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["restartPolicy"] == "Never"  # SidecarMode wants it of the head


def test_prometheus_finds_the_ports_of_every_pod() -> None:
    spec = document("kuberay/ray_cluster.yaml")["spec"]
    monitored = values(document("kuberay/pod_monitor.yaml")["spec"]["podMetricsEndpoints"], "port")
    head = [port["name"] for port in values(spec["headGroupSpec"], "ports")[0]]
    assert set(monitored) == {"metrics", "as-metrics", "dash-metrics"} <= set(head)
    assert [[port["name"] for port in ports] for ports in values(spec["workerGroupSpecs"], "ports")] == [
        ["metrics"]
    ] * 3


def test_no_task_of_a_run_becomes_a_series_wherever_prometheus_runs() -> None:
    (job,) = document("prometheus.yaml")["scrape_configs"]
    (rule,) = job["metric_relabel_configs"]
    ((of_pods,),) = values(document("kuberay/pod_monitor.yaml"), "metricRelabelings")
    assert (of_pods["regex"], of_pods["action"]) == (rule["regex"], rule["action"])
    assert of_pods["sourceLabels"] == rule["source_labels"] == ["__name__", "Name"]
    for dropped in ("ray_tasks;Sampler: sample round 1, task 2 (version 0)", "ray_tasks;Learner: learn from round 3"):
        assert re.fullmatch(rule["regex"], dropped)
    assert not re.fullmatch(rule["regex"], "ray_tasks;Sampler.ready")


def test_compose_listens_on_this_machine_alone_and_mounts_what_is_there() -> None:
    compose = document("compose.yaml")
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)
    assert compose["services"]["ray"]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    for mount in (mount for service in compose["services"].values() for mount in service["volumes"]):
        source = mount.split(":")[0]
        assert (DEPLOY / source).is_file() if source.startswith(".") else source in compose["volumes"]
    for config in compose["configs"].values():
        assert yaml.safe_load(config["content"])["apiVersion"] == 1


@pytest.mark.thorough
def test_the_sizes_in_the_readme_are_those_of_the_plan() -> None:
    rows = re.findall(r"^\| `(\w+\.toml)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 3
    for name, cells in rows:
        lines = dict(
            re.split(r"  +", line, maxsplit=1)
            for line in plan(Recipe.load(ROOT / "deploy" / "recipes" / name)).splitlines()
        )
        learner, pair = lines["learner memory"].removesuffix(" of it per transition").split(" at most, ")
        under_way = lines["trajectory"].split(", ")[1].removesuffix(" in flight")
        expected = [learner, pair, lines["sampler memory"].split(" at most")[0]]
        expected += [lines["reward worker memory"], under_way, lines["weight broadcast"].split(" to ")[0]]
        assert cells.split(" | ") == expected


def test_an_upload_is_small_and_holds_what_a_run_needs(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "upload.zip", True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(tmp_path / "upload.zip") as upload:
        sizes = {entry.filename: entry.compress_size for entry in upload.infolist()}
    needed = ["ray_ddpo/cli.py", "ray_ddpo/train.py", "deploy/recipes/demo.toml"]
    needed += ["ray_ddpo/common/prompt_lists/animals.txt"]
    models = tuple(f"ray_ddpo/common/{name}/" for name in EMBEDDED_MODELS)
    needed += [f"{folder}model_index.json" for folder in models]
    assert set(needed) <= set(sizes)
    left_here = (
        "docs/",
        "tests/",
        ".ci/",
        "common/",
        "actors/",
        "learner/",
        "deploy/cluster/",
        "ray_ddpo/deploy/cluster/",
        "runs/",
        ".venv/",
        ".git/",
    )
    assert [name for name in sizes if name.startswith(left_here)] == []
    assert all(sum(size for name, size in sizes.items() if name.startswith(folder)) < 12e6 for folder in models)
    program = [name for name in sizes if name.startswith(("ray_ddpo/", "deploy/")) or os.sep not in name]
    assert 1e6 < sum(sizes[name] for name in program if not name.startswith(models)) < 6e6
