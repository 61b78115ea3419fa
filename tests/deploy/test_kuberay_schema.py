"""Files for KubeRay and the Prometheus operator have known fields with valid types."""

import copy
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.deploy.kuberay_schema import PodMonitor, RayCluster, RayJob
from tests.deploy.manifests import document

KINDS: dict[str, type[BaseModel]] = {"ray_cluster": RayCluster, "ray_job": RayJob, "pod_monitor": PodMonitor}
CLUSTER = ("spec",)
JOB = ("spec", "rayClusterSpec")


def changed(name: str, place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The file with one field set to something else."""
    tree = copy.deepcopy(document(f"kuberay/{name}.yaml"))
    inner: Any = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


@pytest.mark.parametrize("name", KINDS)
def test_every_field_is_known_and_of_its_type(name: str) -> None:
    KINDS[name].model_validate(document(f"kuberay/{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("ray_cluster", ("apiVersion",), "ray.io/v1alpha1"),
        ("ray_cluster", ("metadata", "name"), "ray_ddpo"),
        ("ray_cluster", (*CLUSTER, "rayversion"), "2.60.0"),
        ("ray_cluster", (*CLUSTER, "authOptions", "mode"), "on"),
        ("ray_cluster", (*CLUSTER, "autoscalerOptions", "version"), 2),
        ("ray_cluster", (*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("ray_cluster", (*CLUSTER, "headGroupSpec", "replicas"), 1),
        ("ray_cluster", (*CLUSTER, "workerGroupSpecs", 0, "minReplicas"), 2),
        ("ray_cluster", (*CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), "1"),
        ("ray_cluster", (*CLUSTER, "workerGroupSpecs", 0, "labels", "ray.io/market-type"), True),
        ("ray_cluster", (*CLUSTER, "workerGroupSpecs", 1, "groupName"), "learner-a100"),
        ("ray_job", ("spec", "submissionMode"), "Sidecar"),
        ("ray_job", ("spec", "backoffLimit"), -1),
        ("ray_job", ("spec", "shutdownAfterJobFinishes"), "true"),
        ("ray_job", ("spec", "runtimeEnvYAML"), {"env_vars": {}}),
        ("ray_job", ("spec", "metadata", "run"), 7),
        ("ray_job", (*JOB, "enableInTreeAutoscaling"), "yes"),
        ("pod_monitor", ("spec", "podMetricsEndpoints", 0, "interval"), 10),
        ("pod_monitor", ("spec", "podMetricsEndpoints", 0, "port"), 8080),
        ("pod_monitor", ("spec", "selector", "matchLabels", "ray.io/is-ray-node"), True),
    ],
)
def test_a_field_that_is_wrong_is_found(name: str, place: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(ValidationError):
        KINDS[name].model_validate(changed(name, place, value))
