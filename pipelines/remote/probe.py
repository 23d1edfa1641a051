"""The small pipeline of ``adapt-pruner doctor``: pods like those of a run, which only look around.

What a pod gets is taken from the compiled pipeline, so that the doctor's pods cannot differ from a run's.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl, kubernetes
from kubernetes.utils.quantity import parse_quantity

from components.check_pod import check_pod
from components.nodes.train_job import QUEUE_LABEL, VARIABLE, NodeSettings
from core.scratch import scratch_folder
from pipelines.cluster import COMPONENT_LABEL, RECIPE_LABEL
from pipelines.ir import Document, read_ir
from pipelines.remote.submission import Submission

_NAME = "check-pod"


@dataclass(frozen=True, kw_only=True)
class Pod:
    """What a component's pod gets, in the fields of the compiled pipeline."""

    component: str
    container: Document
    config: Document
    """The pod's Kubernetes settings."""

    @property
    def accelerators(self) -> tuple[str, int]:
        """Resource name and number of its accelerators."""
        accelerator = self.container["resources"].get("accelerator", {})
        return accelerator.get("resourceType", ""), int(accelerator.get("resourceCount", 0))

    @property
    def requests(self) -> dict[str, str]:
        """What a node must have free for it."""
        resources = self.container["resources"]
        kind, number = self.accelerators
        requests = {"cpu": resources["resourceCpuRequest"], "memory": resources["resourceMemoryRequest"]}
        return requests | ({kind: str(number)} if number else {})

    @property
    def selector(self) -> dict[str, str]:
        """Labels that its node must have."""
        return dict(self.config.get("nodeSelector", {}).get("labels", {}))

    @property
    def tolerations(self) -> list[dict[str, str]]:
        """Taints that it tolerates."""
        return list(self.config.get("tolerations", ()))

    @property
    def shared_memory(self) -> str:
        """Size of its ``/dev/shm``, empty for the container runtime's."""
        mounts = self.config.get("emptyDirMounts", ())
        return next((m.get("sizeLimit", "") for m in mounts if m["mountPath"] == "/dev/shm"), "")

    @property
    def place(self) -> str:
        """What decides where it may run, equal for pods that may run in the same places."""
        volumes = [volume["storageClassName"] for volume in self.config.get("genericEphemeralVolume", ())]
        queue = self.config.get("podMetadata", {}).get("labels", {}).get(QUEUE_LABEL)
        return repr([self.accelerators[0], sorted(self.selector.items()), self.tolerations, volumes, queue])


def pods_of(submission: Submission) -> list[Pod]:
    """Return the pods of a compiled pipeline, one a component; several nodes train in one of theirs."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    pipeline, platform = yaml.load_all(submission.package.content, Loader=loader)
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    pods: dict[str, Pod] = {}
    for label, executor in pipeline["deploymentSpec"]["executors"].items():
        component = re.sub(r"(-left)?(-\d+)?$", "", label.removeprefix("exec-"))
        container = executor["container"]
        told = {variable["name"]: variable["value"] for variable in container.get("env", ())}
        if VARIABLE in told:
            container = container | {"resources": _resources(NodeSettings.of(told).resources)}
        pod = Pod(component=component, container=container, config=configs[label])
        pods.setdefault(component, pod)
    return list(pods.values())


def _resources(of_a_node: Mapping[str, Mapping[str, str]]) -> Document:
    """Return the resources of a container as the compiled pipeline has them."""
    requests, limits = of_a_node["requests"], dict(of_a_node["limits"])
    found: Document = {
        "resourceCpuRequest": requests["cpu"],
        "resourceMemoryRequest": requests["memory"],
        "resourceMemoryLimit": limits.pop("memory"),
    }
    for kind, number in limits.items():
        found["accelerator"] = {"resourceType": kind, "resourceCount": number}
    return found


def largest_pods(pods: list[Pod]) -> list[Pod]:
    """Return the largest pod of each place: where it runs, the others do."""
    largest: dict[str, Pod] = {}
    for pod in pods:
        largest[pod.place] = max(largest.get(pod.place, pod), pod, key=_size)
    return list(largest.values())


def _size(pod: Pod) -> tuple[Decimal, ...]:
    requests = {name: parse_quantity(value) for name, value in pod.requests.items()}
    return requests.get(pod.accelerators[0], Decimal(0)), requests["memory"], requests["cpu"]


def write_probe(submission: Submission, pods: Iterable[Pod], path: Path) -> None:
    """Write the pipeline that runs ``check-pod`` in a pod like each of ``pods``, at the same time."""
    pipeline, platform = _of_one_task()
    dag, components = pipeline["root"]["dag"]["tasks"], pipeline["components"]
    executors = pipeline["deploymentSpec"]["executors"]
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    configs.clear()
    task, component = dag.pop(_NAME), components.pop(f"comp-{_NAME}")
    container = executors.pop(f"exec-{_NAME}")["container"]
    for pod in pods:
        name, label = f"comp-{pod.component}", f"exec-{pod.component}"
        dag[pod.component] = copy.deepcopy(task)
        dag[pod.component]["componentRef"]["name"] = name
        dag[pod.component]["taskInfo"]["name"] = f"check in a pod like {pod.component}'s"
        constant = dag[pod.component]["inputs"]["parameters"]["expected"]["runtimeValue"]
        constant["constant"] = _expected(submission, pod)
        components[name] = component | {"executorLabel": label}
        ours = {key: container[key] for key in ("command", "args")}
        executors[label] = {"container": pod.container | ours}
        configs[label] = pod.config | {"podMetadata": {"labels": dict(_labels(pod))}}
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    path.write_text(yaml.dump_all([pipeline, platform], Dumper=dumper))


def _of_one_task() -> tuple[Document, Document]:
    def tasks() -> None:
        task = check_pod(expected={"version": ""}).set_caching_options(False)
        kubernetes.add_pod_label(task, RECIPE_LABEL, "doctor")  # else there would be no PlatformSpec

    made = dsl.pipeline(name="adapt-pruner-doctor", display_name="Adapt-Pruner doctor")(tasks)
    with scratch_folder() as folder:
        path = folder / "pipeline.yaml"
        compiler.Compiler().compile(made, str(path))
        return read_ir(path)


def _expected(submission: Submission, pod: Pod) -> dict[str, Any]:
    settings = submission.settings
    kind, number = pod.accelerators
    return {
        "version": metadata.version("adapt-pruner"),
        "store": settings.storage.store,
        "tracking_uri": settings.tracking.uri,
        "secret": settings.cluster.secret,
        "config_map": settings.cluster.config_map,
        "accelerators": number,
        "accelerator_type": kind,
        "shared_memory": pod.shared_memory,
    }


def _labels(pod: Pod) -> Iterator[tuple[str, str]]:
    """Yield the labels of its pod, less that of the phase, which is an expression over the task's name."""
    yield COMPONENT_LABEL, pod.component
    yield RECIPE_LABEL, "doctor"
    if queue := pod.config.get("podMetadata", {}).get("labels", {}).get(QUEUE_LABEL):
        yield QUEUE_LABEL, queue
