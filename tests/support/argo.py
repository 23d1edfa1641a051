"""Argo's workflow of our pipeline, with the nodes that Kubeflow Pipelines 2.17 makes of its tasks.

Seen there, and the same here: every template is retried, so that each node stands below a Retry; a task is a
driver, then a DAG of one executor, whose attempts are pods; what a pod's main container has said in
/dev/termination-log follows its exit code.
"""

import base64
import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

_WORKFLOW = "adapt-pruner-x(0)"
_HANDLER = f"{_WORKFLOW}.root(0).exit-handler-1"
_LARGEST = 2**20
_INPUTS = {
    "parameters": [{"name": "component", "value": "x" * 7_000}]
}  # as large as they are there, on average
_RECORDED = Path(__file__).with_name("recorded_workflows.txt")
_STATES = {"Pending": "PENDING", "Running": "RUNNING", "Succeeded": "SUCCEEDED", "Skipped": "SKIPPED"}
_STATES |= {"Failed": "FAILED", "Error": "FAILED"}

Node = dict[str, Any]


def node(type_: str, phase: str, name: str, started: str, finished: str = "-", message: str = "") -> Node:
    """A node as the status of a workflow has it."""
    return {
        "id": f"adapt-pruner-x-{abs(hash(name))}",
        "name": name,
        "displayName": name.rpartition(".")[2],
        "type": type_,
        "phase": phase,
        "startedAt": started,
        "finishedAt": None if finished == "-" else finished,
        **({"message": message} if message else {}),
    }


def task(place: str, phase: str, message: str = "", *, ago: float = 60, earlier: str = "") -> list[Node]:
    """All nodes of a task, such as ``phase-2.calibrate``, that started so many seconds ago.

    ``phase`` and ``message`` are of its latest pod, ``earlier`` is the message of an attempt before.
    """
    name = _full(place)
    ended = "-" if phase in ("Pending", "Running") else _moment(ago - 1)
    of_task = "Running" if phase == "Pending" else phase
    started = _moment(ago)
    nodes = [
        node("Retry", "Succeeded", f"{name}-driver", started, started),
        node("Pod", "Succeeded", f"{name}-driver(0)", started, started),
        node("Retry", of_task, name, started, ended),
        node("DAG", of_task, f"{name}(0)", started, ended),
        node("Retry", of_task, f"{name}(0).executor", started, ended, message),
    ]
    pods = [("Error", earlier)] if earlier else []
    pods.append((phase, message))
    return nodes + [
        node("Pod", state, f"{name}(0).executor({i})", started, ended, said)
        for i, (state, said) in enumerate(pods)
    ]


def driver(place: str, phase: str, message: str = "", *, ago: float = 60) -> list[Node]:
    """The driver of a task or of a group of tasks, which has not begun."""
    name, ended = _full(place), "-" if phase in ("Pending", "Running") else _moment(ago)
    started, state = _moment(ago), "Running" if phase == "Pending" else phase
    nodes = [
        node("Retry", state, f"{name}-driver", started, ended, message),
        node("Pod", phase, f"{name}-driver(0)", started, ended, message),
    ]
    if phase in ("Failed", "Error"):
        nodes.append(node("Skipped", "Omitted", name, started, ended, "omitted: depends condition not met"))
    return nodes


def of_older_argo(nodes: list[Node]) -> list[Node]:
    """The same nodes up to Kubeflow Pipelines 2.16: only the executor is retried."""
    kept = []
    for each in nodes:
        name = each["name"]
        head, _, last = name.rpartition(".")
        if last.startswith("executor"):
            name = f"{head.replace('(0)', '')}.{last}"
        elif each["type"] == "Retry":
            continue
        else:
            name = name.replace("(0)", "")
        kept.append(each | {"name": name, "displayName": name.rpartition(".")[2]})
    return kept


def workflow(
    nodes: list[Node], *, policy: str = "OnError", deadline: int | None = None, message: str = ""
) -> dict[str, Any]:
    """A manifest of these tasks with its status, packed where it is large, as Argo does.

    Kubeflow Pipelines up to 2.16 set no ``policy`` of retries; ``deadline`` is 0 if the run was terminated.
    """
    started = _moment(3600)
    above = [node("Retry", "Running", _WORKFLOW[:-3], started), node("DAG", "Running", _WORKFLOW, started)]
    above += [node("Retry", "Running", _HANDLER, started), node("DAG", "Running", f"{_HANDLER}(0)", started)]
    backoff = {"limit": "{{inputs.parameters.retry-max-count}}", "backoff": {"duration": "30s"}}
    spec: dict[str, Any] = {"templates": [{"name": "retry-system-container-impl", "retryStrategy": backoff}]}
    if policy:
        spec["templateDefaults"] = {"retryStrategy": {"limit": "2", "retryPolicy": policy}}
    if deadline is not None:
        spec["activeDeadlineSeconds"] = deadline
    all_nodes = {each["name"]: each | {"inputs": _INPUTS} for each in above + nodes}
    status: dict[str, Any] = {"phase": "Running", "nodes": all_nodes} | (
        {"message": message} if message else {}
    )
    if len(json.dumps(status)) > _LARGEST:
        packed = gzip.compress(json.dumps(status.pop("nodes")).encode())
        status["compressedNodes"] = base64.b64encode(packed).decode()
    return {"metadata": {"name": _WORKFLOW[:-3], "namespace": "kubeflow"}, "spec": spec, "status": status}


def task_details(manifest: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What the newer API makes of the nodes; None, nothing new, where they are packed."""
    nodes = manifest.get("status", {}).get("nodes")
    if nodes is None:
        return None
    return [
        {
            "display_name": each["displayName"],
            "task_id": each["id"],
            "start_time": each["startedAt"],
            "end_time": each["finishedAt"] or "0001-01-01T00:00:00Z",
            **({"state": _STATES[each["phase"]]} if each["phase"] in _STATES else {}),
        }
        for each in nodes.values()
    ]


def recorded() -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Workflows of a real installation: what happened to the run's states and the manifest."""
    cases: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for part in _RECORDED.read_text().split("\n== ")[1:]:
        head, *lines = part.splitlines()
        title, states, deadline, policy = (field.strip() for field in head.split("|"))
        nodes = []
        for line in filter(None, lines):
            type_, phase, started, finished, name, *message = line.split(" ", 5)
            said = "".join(message).replace("\\n", "\n")
            nodes.append(node(type_, phase, name, started, finished, said))
        manifest = workflow(nodes, policy=policy, deadline=int(deadline) if deadline else None)
        cases[title] = states.split(), manifest
    return cases


def _full(place: str) -> str:
    group, _, name = place.rpartition(".")
    if place == "root":
        return f"{_WORKFLOW}.root"
    if group == "root":  # of a pipeline without an exit handler
        return f"{_WORKFLOW}.root(0).{name}"
    if name in ("resolve-base", "needs-run", "prepare", "go-on"):
        return f"{_HANDLER}(0).{name}"
    if name == "finalize":
        return f"{_HANDLER}.onExit(0).{name}"
    return f"{_HANDLER}(0).{group + '(0).' if group else ''}{name}"


def _moment(ago: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
