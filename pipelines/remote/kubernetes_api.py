"""What the doctor asks of the Kubernetes API: secrets' keys, nodes, and why a pod waits.

By the ``kubernetes`` client with a kubeconfig, as a person would by ``kubectl``. Values are not kept.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from core.errors import ClusterError, SettingsError
from pipelines.cluster import COMPONENT_LABEL
from pipelines.remote.client import one_line

_TIMEOUT_S = 30
_PAGE = 500
_RUN_LABEL = "pipeline/runid"  # of all pods of a run of Kubeflow Pipelines

Document = dict[str, Any]


class Kubernetes:
    """The API of a kubeconfig's cluster; all raise a ``ClusterError`` if it refuses or cannot be reached."""

    def __init__(self, kubeconfig: Path | None, context: str) -> None:
        """Read the kubeconfig; nothing is contacted yet.

        Args:
            kubeconfig: Its path; None for kubectl's own.
            context: Name of one of its contexts, empty for the current one.

        Raises:
            SettingsError: If it cannot be used.
        """
        try:
            connection = config.new_client_from_config(
                str(kubeconfig) if kubeconfig else None, context or None
            )
        except Exception as error:  # of YAML, of files, and the client's own
            where = f"--kubeconfig={kubeconfig}" if kubeconfig else "the kubeconfig"
            raise SettingsError(
                [f"{where} cannot be used: {one_line(str(error))}. Correct it, or leave it out."]
            ) from None
        self._core = client.CoreV1Api(connection)

    def keys_of(self, kind: str, namespace: str, name: str) -> set[str] | None:
        """Return the keys of a ``secret`` or ``config_map`` that have a value; None if there is none."""
        read = getattr(self._core, f"read_namespaced_{kind}")
        try:
            found = self._ask(f"get {kind.replace('_', '')}s", read, name=name, namespace=namespace)
        except _MissingError:
            return None
        return {key for key, value in (found.get("data") or {}).items() if value}

    def nodes(self) -> list[Document]:
        """Return all nodes."""
        return self._all("list nodes", self._core.list_node)

    def why_it_waits(self, namespace: str, run_id: str, component: str) -> str:
        """Return the reason that the scheduler or the kubelet gives for a pod that waits, "" for none."""
        label = f"{_RUN_LABEL}={run_id},{COMPONENT_LABEL}={component}"
        pods = self._all(
            "list pods", self._core.list_namespaced_pod, namespace=namespace, label_selector=label
        )
        pods = [pod for pod in pods if pod.get("status", {}).get("phase") == "Pending"]
        if not pods:
            return ""
        pod = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
        events = self._all(
            "list events",
            self._core.list_namespaced_event,
            namespace=namespace,
            field_selector=f"involvedObject.name={pod['metadata']['name']}",
        )
        reason, message = _waiting(pod["status"])
        warnings = [str(each.get("message", "")) for each in events if each.get("type") == "Warning"]
        said = max([message, *warnings], key=len)  # the one that says most
        return one_line(": ".join(filter(None, [reason, said])), 600)

    def _all(self, verb: str, call: Callable[..., Any], **arguments: str) -> list[Document]:
        items, more = list[Document](), ""
        while True:
            page = self._ask(verb, call, limit=_PAGE, _continue=more, **arguments)
            items += page["items"]
            more = page.get("metadata", {}).get("continue", "")
            if not more:
                return items

    def _ask(self, verb: str, call: Callable[..., Any], **arguments: Any) -> Document:
        """Return the answer as it is, without the client's models, which refuse fields that they require.

        Raises:
            _MissingError: If there is no such object.
            ClusterError: If the API refuses or cannot be reached.
        """
        try:
            answer = call(**arguments, _preload_content=False, _request_timeout=_TIMEOUT_S)
            return dict(json.loads(answer.data))
        except client.ApiException as error:
            if error.status == 404:
                raise _MissingError from None
            if error.status in (401, 403):
                raise ClusterError(
                    f"your account must not {verb} ({error.status}), so that this was not looked at. Ask for "
                    "that right, or leave --kubeconfig out."
                ) from None
            said = one_line(str(error.body or error.reason))
            raise ClusterError(
                f"the Kubernetes API answers {error.status} ({said}). Try again later."
            ) from None
        except (HTTPError, ValueError) as error:
            cause = one_line(str(getattr(error, "reason", None) or error).rpartition(": ")[2])
            raise ClusterError(
                f"the Kubernetes API cannot be reached ({cause}). Correct --kubeconfig."
            ) from None


class _MissingError(Exception):
    """The API knows no such object."""


def _waiting(status: Document) -> tuple[str, str]:
    """Return why the scheduler has no node for a pod, or the kubelet does not start its containers."""
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("reason", ""), condition.get("message", "")
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return waiting["reason"], waiting.get("message", "")
    return "", ""
