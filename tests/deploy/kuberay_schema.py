"""KubeRay's objects, as far as the files in deploy/ use them: each field with its type and range.

No package has the published CustomResourceDefinitions, so these fields are typed after the API reference of KubeRay
v1.7.1. A field that is not in the published ones is dropped by Kubernetes without a word: here it is refused. Pods are
left to the schemas of Kubernetes.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

Count = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Seconds = Annotated[StrictInt, Field(ge=1, lt=2**31)]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[StrictStr, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
Labels = dict[LabelKey, LabelValue]
Duration = Annotated[StrictStr, Field(pattern=r"^([0-9]+(ms|s|m|h))+$")]
# Names of services are made from it, so it is a DNS label (RFC 1035), and the operator takes 47 letters at the most.
Name = Annotated[StrictStr, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=47)]


class Known(BaseModel):
    """Only the fields that are named, of exactly these types: Kubernetes turns no number into a text."""

    model_config = ConfigDict(extra="forbid")


class Metadata(Known):
    name: Name
    labels: Labels = {}


class PodTemplate(Known):
    """What is in the pod is checked by Kubernetes' own schema."""

    metadata: dict[str, Any] = {}
    spec: dict[str, Any]


class Group(Known):
    rayStartParams: dict[str, StrictStr]  # a number without quotes is refused
    template: PodTemplate


class HeadGroup(Group):
    pass


class WorkerGroup(Group):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    labels: Labels = {}

    @model_validator(mode="after")
    def _lie_in_order(self) -> "WorkerGroup":
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"replicas {self.replicas} must lie between {self.minReplicas} and {self.maxReplicas}")
        return self


class AuthOptions(Known):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Known):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count


class ClusterSpec(Known):
    rayVersion: StrictStr
    authOptions: AuthOptions
    enableInTreeAutoscaling: StrictBool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]

    @model_validator(mode="after")
    def _groups_have_names_of_their_own(self) -> "ClusterSpec":
        names = [group.groupName for group in self.workerGroupSpecs]
        if len(set(names)) < len(names):
            raise ValueError(f"worker groups are called {names}")
        return self


class JobSpec(Known):
    entrypoint: StrictStr
    metadata: dict[str, StrictStr]
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Count
    preRunningDeadlineSeconds: Seconds
    shutdownAfterJobFinishes: StrictBool
    ttlSecondsAfterFinished: Count
    runtimeEnvYAML: StrictStr
    rayClusterSpec: ClusterSpec


class RayCluster(Known):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(Known):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class Relabeling(Known):
    sourceLabels: list[Annotated[StrictStr, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]]
    targetLabel: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]


class Dropping(Known):
    sourceLabels: list[Annotated[StrictStr, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]]
    regex: StrictStr
    action: Literal["drop", "keep"]


class MetricsEndpoint(Known):
    port: Annotated[StrictStr, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?$")]  # a port's name
    interval: Duration
    relabelings: list[Relabeling] = []
    metricRelabelings: list[Relabeling | Dropping] = []


class Selector(Known):
    matchLabels: Labels


class MonitorSpec(Known):
    selector: Selector
    podMetricsEndpoints: list[MetricsEndpoint]


class PodMonitor(Known):
    """The Prometheus operator's."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: MonitorSpec
