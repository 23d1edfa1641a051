"""The compiled pipeline (KFP's IR): equal parts are stored once, and its size on a cluster is estimated.

A pipeline that Argo cannot store fails when it is submitted, or worse, when its status has grown for a day.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST_WORKFLOW_BYTES = 2**20
"""Argo keeps a workflow and its status in one Kubernetes object, which it refuses to write beyond this."""

# KFP's own templates: drivers, and executors that start the launcher, one for each number of labels.
_GENERIC_TEMPLATES_BYTES = 20_000
# A task's inputs and the addresses of its outputs: what is alike in all of them, and ids, which are not.
_EXECUTOR_INPUT, _UNIQUE_IDS = "x" * 1_300, 15
_HASH = "0" * 64

WAYS = ("go-on", "prepare")
"""The tasks of which one is skipped: see ``pipelines/resuming.py``."""

Document = dict[str, Any]


def read_ir(path: Path) -> tuple[Document, Document]:
    """Read a compiled pipeline: its PipelineSpec and its PlatformSpec."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    pipeline, platform = yaml.load_all(path.read_text(), Loader=loader)
    return pipeline, platform


def write_ir(pipeline: Document, platform: Document, heading: str, path: Path) -> None:
    """Write a compiled pipeline below a heading of comments."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    path.write_text(heading + yaml.dump_all([pipeline, platform], Dumper=dumper))


def heading_of(path: Path) -> str:
    """Return the comments at the head of a compiled pipeline.

    Without the defaults of mappings, whose order there differs from process to process.
    """
    lines = path.read_text().splitlines(keepends=True)
    heading = "".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    return re.sub(r"(?m)^(#\s+\w+: dict) \[Default: .*\]$", r"\1", heading)


def share_components(pipeline: Document, platform: Document) -> None:
    """Let tasks of equal components share one definition, in place.

    The SDK repeats each task's component and executor, also those of every phase. KFP's backend
    keeps components apart by their name and visits each once, whatever the number of tasks that refer to it.
    """
    executors = pipeline["deploymentSpec"]["executors"]
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    labels = _merge(executors, lambda label: [executors[label], configs.get(label)])
    for label in configs.keys() - executors.keys():
        del configs[label]
    components = pipeline["components"]
    for component in components.values():
        if "executorLabel" in component:
            component["executorLabel"] = labels[component["executorLabel"]]
    # A pipeline within a pipeline is equal to another only once what it refers to is.
    before = len(components) + 1
    while len(components) < before:
        before = len(components)
        names = _merge(components, lambda name: components[name])
        for dag in _dags(pipeline):
            for task in dag["tasks"].values():
                task["componentRef"]["name"] = names[task["componentRef"]["name"]]


def _merge(parts: Document, content: Callable[[str], Any]) -> dict[str, str]:
    """Drop all but the first of equal parts; returns each part's name now."""
    first: dict[str, str] = {}
    names = {}
    for name in sorted(parts, key=lambda name: (len(name), name)):  # x before x-2, x-2 before x-10
        names[name] = first.setdefault(json.dumps(content(name), sort_keys=True), name)
    for name in names.keys() - set(names.values()):
        del parts[name]
    return names


def workflow_bytes(pipeline: Document, platform: Document) -> int:
    """Estimate the size of the Argo workflow that a pipeline becomes, at the end of a run.

    Argo stores the specification as it is, and the status, once the whole is too large, with its nodes as
    base64 of gzip. So this writes both as KFP's and Argo's sources do, with stand-ins for names and times:

    * Specification: every DAG, Kubernetes configuration and container, with its component, once as text;
      containers that are equal are one. A driver and an executor for each task of each DAG, with the task's
      definition as text.
    * Status: six nodes a task that runs in a container (the driver's retries and its attempt, the executor's
      retries around it and in it, and its attempt) and four a DAG task, which KFP retries, too. A node
      repeats its inputs with all placeholders replaced: the driver's component, container and configuration,
      and thrice the pod's patch, which is made of them. Of the two ways that a run may take, the larger one;
      a task of the other is two short nodes.

    Where a task is tried again its second attempt is one node more: each is counted twice.

    A task without retries comes to 1.2 kB here as in the workflow that KFP's compiler writes for its example
    pipeline_with_reused_component (2.15; later versions write less). Runs of one and of three phases, nodes
    compressed, ended at 158,814 and 226,428 bytes on KFP 2.17 and Argo 4.0.5 in which hardly a task was tried
    again; this says 174,662 and 255,691 of such pipelines.
    """
    executors = pipeline["deploymentSpec"]["executors"]
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    components = pipeline["components"].values()
    tasks = {
        _text(executors[component["executorLabel"]]["container"]): _text(component)
        for component in components
        if "executorLabel" in component
    }
    dags = [pipeline["root"], *(component for component in components if "dag" in component)]
    texts = [*map(_text, dags), *tasks.keys(), *tasks.values(), *map(_text, configs.values())]
    specification = [{"name": f"components-{_HASH}", "value": text} for text in texts]
    specification += [entry for dag in _dags(pipeline) for entry in _template_tasks(pipeline, platform, dag)]
    status = max(_status_bytes(pipeline, platform, skipped) for skipped in WAYS)
    return len(_text(specification)) + _GENERIC_TEMPLATES_BYTES + status


def _status_bytes(pipeline: Document, platform: Document, skipped: str) -> int:
    """Estimate what the nodes of a run take in which a task's condition does not hold."""
    nodes = sorted(_nodes(pipeline, platform, pipeline["root"], "root", skipped), key=lambda node: node["id"])
    return len(base64.b64encode(gzip.compress(_text(nodes).encode(), compresslevel=6, mtime=0)))


def _template_tasks(pipeline: Document, platform: Document, dag: Document) -> Iterator[Document]:
    """Yield the two tasks of Argo's DAG template that each task becomes."""
    for name, task in dag["tasks"].items():
        references = {
            "component": f"{{{{workflow.parameters.components-{_HASH}}}}}",
            "container": f"{{{{workflow.parameters.implementations-{_HASH}}}}}",
            "kubernetes-config": f"{{{{workflow.parameters.kubernetes-{task['componentRef']['name']}}}}}",
            "parent-dag-id": "{{inputs.parameters.parent-dag-id}}",
            "task": _text(task),
            "task-name": name,
        }
        depends = " && ".join(f"{other}.Succeeded" for other in task.get("dependentTasks", []))
        yield _template_task(f"{name}-driver", "system-container-driver", references) | {"depends": depends}
        outputs = ("pod-spec-patch", "cached-decision", "condition")
        patch = {key: f"{{{{tasks.{name}-driver.outputs.parameters.{key}}}}}" for key in outputs}
        retries = {f"retry-{key}": "600" for key in ("max-count", "backoff-duration", "factor", "max")}
        labels = _labels(pipeline, platform, task)
        yield _template_task(name, "retry-system-container-executor", patch | labels | retries)


def _labels(pipeline: Document, platform: Document, task: Document) -> dict[str, str]:
    """Return the parameters by which KFP hands the labels of a task's pods from template to template."""
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    label = pipeline["components"][task["componentRef"]["name"]].get("executorLabel")
    labels = configs.get(label, {}).get("podMetadata", {}).get("labels", {})
    return {
        f"pod-metadata-label-{kind}-{number}": text
        for number, pair in enumerate(sorted(labels.items()), 1)
        for kind, text in zip(("key", "val"), pair, strict=True)
    }


def _template_task(name: str, template: str, parameters: Mapping[str, str]) -> Document:
    arguments = {"parameters": [{"name": key, "value": value} for key, value in parameters.items()]}
    return {"name": name, "template": template, "arguments": arguments}


def _nodes(
    pipeline: Document, platform: Document, component: Document, path: str, skipped: str
) -> Iterator[Document]:
    """Yield the nodes of the status below a DAG, those of DAGs within it included."""
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    tasks = component["dag"]["tasks"]
    omitted = _after(skipped, tasks)
    for name, task in tasks.items():
        inner, where = pipeline["components"][task["componentRef"]["name"]], f"{path}.{name}"
        if name in omitted:
            yield from (_node(f"{where}{kind}", {}, {}) for kind in ("-driver", ""))
            continue
        inputs = {"component": _text(inner), "task": _text(task), "parent-dag-id": "12345"}
        if "dag" in inner:
            for kind in ("-driver", "-driver(0)"):
                yield _node(f"{where}{kind}", inputs, {"execution-id": "12345", "condition": "true"})
            for kind in ("", "(0)"):
                yield _node(f"{where}{kind}", {"parent-dag-id": "12345", "condition": "true"}, {})
            if name != skipped:
                yield from _nodes(pipeline, platform, inner, where, skipped)
            continue
        container = pipeline["deploymentSpec"]["executors"][inner["executorLabel"]]["container"]
        inputs |= {"container": _text(container), "kubernetes-config": _text(configs[inner["executorLabel"]])}
        ids = [_identity(f"{where} {i}") for i in range(_UNIQUE_IDS)]
        patch = {"pod-spec-patch": _text([*inputs.values(), _EXECUTOR_INPUT, *ids])}
        for kind in ("-driver", "-driver(0)"):
            yield _node(f"{where}{kind}", inputs, patch)
        for kind in ("", ".executor", ".executor.retry", ".executor(0)", ".executor(1)"):
            yield _node(f"{where}{kind}", patch | _labels(pipeline, platform, task), {})


def _after(skipped: str, tasks: Document) -> set[str]:
    """Return the tasks that wait for one that is skipped, or for one that does."""
    found = {skipped}
    while more := {n for n, t in tasks.items() if found & set(t.get("dependentTasks", ()))} - found:
        found |= more
    return found - {skipped}


def _node(name: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Document:
    identity = _identity(name)
    return {
        "id": f"adapt-pruner-abcde-{identity}",
        "name": f"adapt-pruner-abcde.{name}",
        "displayName": name.rpartition(".")[2],
        "type": "Pod",
        "templateName": "retry-system-container-executor",
        "templateScope": "local/adapt-pruner-abcde",
        "phase": "Succeeded",
        "boundaryID": f"adapt-pruner-abcde-{_identity(name + 'above')}",
        "startedAt": f"2026-01-01T00:{identity[:2]}:{identity[2:4]}Z",
        "finishedAt": f"2026-01-01T01:{identity[4:6]}:{identity[6:8]}Z",
        "progress": "1/1",
        "resourcesDuration": {"cpu": identity[8:10], "memory": identity[10:14]},
        "inputs": {"parameters": [{"name": key, "value": value} for key, value in inputs.items()]},
        "outputs": {
            "parameters": [{"name": key, "value": value} for key, value in outputs.items()],
            "artifacts": [
                {"name": "main-logs", "s3": {"key": f"artifacts/adapt-pruner/{identity}/main.log"}}
            ],
        },
        "children": [f"adapt-pruner-abcde-{_identity(name + 'below')}"],
        "hostNodeName": f"node-{identity[:4]}",
    }


def _dags(pipeline: Document) -> Iterator[Document]:
    yield pipeline["root"]["dag"]
    for component in pipeline["components"].values():
        if "dag" in component:
            yield component["dag"]


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _identity(name: str) -> str:
    """Return what stands in for an id: digits that gzip cannot shorten much."""
    return str(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
