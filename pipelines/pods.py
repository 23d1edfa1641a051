"""What Argo says of the pods of a run: why they wait, and why they have failed.

Kubeflow Pipelines knows it and does not pass it on with a run's tasks (kubeflow/pipelines 14007). Its older
API (v1beta1), which it still serves, gives the whole workflow.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.kfp_access import Client, one_line


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod that waits or has failed."""

    task: str
    """What people call its task; "" if it belongs to none."""
    failed: bool
    """Whether it has failed; else it waits."""
    message: str
    """What Argo says of why."""


def troubled_pods(client: Client, run_id: str, tasks: Mapping[str, str]) -> list[Pod]:
    """Return the pods of a run that wait or have failed and of which Argo says why, the latest first.

    Args:
        client: The connection.
        run_id: Which run.
        tasks: Task in the IR to how people call it; ``{}`` stands for the phase.

    Returns:
        Nothing where the server does not tell.
    """
    nodes = sorted(_nodes(client.workflow(run_id)), key=lambda node: str(node.get("startedAt")), reverse=True)
    return [
        Pod(
            task=_task_of(str(node.get("name")), tasks),
            failed=node["phase"] != "Pending",
            message=one_line(str(node["message"])),
        )
        for node in nodes
        if node.get("type") == "Pod"
        and node.get("phase") in ("Pending", "Failed", "Error")
        and node.get("message")
    ]


def _nodes(workflow: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    status = workflow.get("status")
    nodes = status.get("nodes") if isinstance(status, dict) else None
    for node in nodes.values() if isinstance(nodes, dict) else ():
        if isinstance(node, dict):
            yield node


def _task_of(path: str, tasks: Mapping[str, str]) -> str:
    """Return the task of a pod by its place in the workflow: ``x.root.phase-2.calibrate.executor(0)``."""
    phase, found = 1, ""
    for part in path.split("."):
        name = re.sub(r"\(\d+\)$", "", part).removesuffix("-driver")
        if match := re.fullmatch(r"phase(?:-(\d+))?", name):
            phase = int(match[1] or 1)
        elif name in tasks:
            found = tasks[name].format(phase)
    return found
