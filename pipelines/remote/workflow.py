"""A run as Argo sees it: the state of each task, when it started and ended, and the reason given.

Read from the workflow in the older API (v1beta1) of Kubeflow Pipelines, since in the newer one, which kfp's
client asks, tasks have no reasons, and stop changing once the workflow exceeds 1 MiB.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.remote.client import one_line

FAILED = ("Failed", "Error")

_DRIVER = "-driver"
_LONGEST_MESSAGE = 4096  # what the kubelet keeps of a container's own words
_Node = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """A task that has begun, or its driver: the pod of KFP's own that comes before it."""

    name: str
    """Its name for people: ``phase 2 calibrate``."""
    phase: str
    """Argo's: Pending while its pod waits, Running, Succeeded, Skipped, Failed or Error."""
    settings: str = "cluster"
    """Where its settings are: ``cluster.components.calibrate``."""
    message: str = ""
    """Argo's reason for the state of its latest pod."""
    started: float = 0.0
    """In seconds since 1970, as is the end; 0 for not yet."""
    finished: float = 0.0
    ended_pods: tuple[str, ...] = ()
    """Ids of those of its pods that have ended, in the order of their start."""


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A run as Argo sees it."""

    namespace: str = ""
    """Where its pods are."""

    tasks: tuple[TaskState, ...] = ()
    """Those that have begun, in the order of their start."""
    drivers: tuple[TaskState, ...] = ()
    message: str = ""
    """Argo's reason for the state of the whole."""
    retry_policy: str = "OnFailure"
    """After which ends of an attempt Argo starts another."""
    was_terminated: bool = False
    """Whether somebody terminated it."""


def read_workflow(workflow: Mapping[str, Any], tasks: Mapping[str, str]) -> Workflow:
    """Read Argo's workflow.

    Args:
        workflow: Its manifest.
        tasks: Task in the IR to its name for people; ``{}`` stands for the phase.
    """
    spec, status = _mapping(workflow.get("spec")), _mapping(workflow.get("status"))
    nodes = [node for node in _mapping(status.get("nodes")).values() if isinstance(node, dict)]
    groups = defaultdict[tuple[str, ...], list[_Node]](list)
    for node in sorted(nodes, key=lambda node: (str(node.get("startedAt")), str(node.get("name")))):
        if node.get("phase") != "Omitted" and (place := _place(node)):
            groups[place].append(node)
    found = {
        place: _state(place, group, tasks)
        for place, group in groups.items()
        if place[-1] in tasks or place[-1].endswith(_DRIVER)
    }
    return Workflow(
        namespace=str(_mapping(workflow.get("metadata")).get("namespace") or ""),
        tasks=tuple(state for place, state in found.items() if place[-1] in tasks),
        drivers=tuple(state for place, state in found.items() if place[-1] not in tasks),
        message=one_line(str(status.get("message") or "")),
        retry_policy=_retry_policy(spec),
        was_terminated=spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown")),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _place(node: _Node) -> tuple[str, ...]:
    """Return the task of a node by its name, such as ``x.root(0).phase-2(1).calibrate(0).executor(0)``."""
    path = [re.sub(r"\(\d+\)$", "", part) for part in str(node.get("name")).split(".")[1:]]
    return tuple(path[:-1] if path[-1:] == ["executor"] else path)


def _state(place: tuple[str, ...], nodes: list[_Node], tasks: Mapping[str, str]) -> TaskState:
    """Return the state of a task from all its nodes, those of earlier attempts among them."""
    # Retries of groups make a task begin again. Of nodes that began together the outermost comes first.
    node = max(nodes, key=lambda node: str(node.get("startedAt")))
    pods = [node for node in nodes if node.get("type") == "Pod"]
    pod = pods[-1] if pods else node
    task = place[-1].removesuffix(_DRIVER)
    found = [match for part in place if (match := re.fullmatch(r"phase-?(left|)-?(\d*)", part))]
    numbers = [f"{match[1]} {match[2] or 1}".strip() for match in found]
    name = tasks[task].format(*numbers or "1") if task in tasks else one_line(task, 60)
    waits = node.get("phase") == "Running" and pod.get("phase") == "Pending"
    return TaskState(
        name=name if place[-1] in tasks else f"{name}'s driver",
        phase="Pending" if waits else str(node.get("phase")),
        settings="cluster.components." + re.sub(r"(-left|-done)?(-\d+)?$", "", task)
        if place[-1] in tasks
        else "cluster",
        message=one_line(str(pod.get("message") or ""), _LONGEST_MESSAGE),
        started=_seconds(node.get("startedAt")),
        finished=_seconds(node.get("finishedAt")),
        ended_pods=tuple(str(p.get("id")) for p in pods if p.get("phase") not in ("Pending", "Running")),
    )


def _seconds(moment: Any) -> float:
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except ValueError:
        return 0.0


def _retry_policy(spec: Mapping[str, Any]) -> str:
    """Return the policy of the tasks: that of their template, else of the workflow, else Argo's default."""
    templates = spec.get("templates")
    found = [spec.get("templateDefaults"), *(templates if isinstance(templates, list) else ())]
    strategies = [_mapping(_mapping(template).get("retryStrategy")) for template in found]
    return next((str(s["retryPolicy"]) for s in reversed(strategies) if s.get("retryPolicy")), "OnFailure")
