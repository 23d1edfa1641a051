"""What is asked of the Kubernetes API: the step's own pod, its TrainJob, pods and logs of the nodes."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.nodes.train_job import GROUP, NODE, PLURAL, VERSION
from core.errors import ClusterError

if TYPE_CHECKING:
    from kubernetes.client import ApiException

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_S = 30
_JOB_SET = "jobset.sigs.k8s.io/jobset-name"
_INDEX = "batch.kubernetes.io/job-completion-index"


class BusyApiError(Exception):
    """The API does not answer now; it may when it is asked again."""


class Api:
    """The API as the service account of this pod sees it."""

    def __init__(self, nodes: int) -> None:
        """Find it.

        Args:
            nodes: How many are wanted, for the error.

        Raises:
            ClusterError: If this is no pod with a service account.
        """
        from kubernetes import client, config

        try:
            config.load_incluster_config()
            self.namespace = NAMESPACE.read_text().strip()
        except (config.ConfigException, OSError) as error:
            raise ClusterError(
                f"training.nodes={nodes} needs a pod of a Kubernetes cluster with the token of its service "
                f"account: {error}. Submit the run to a cluster, or set training.nodes=1."
            ) from None
        self._jobs, self._core = client.CustomObjectsApi(), client.CoreV1Api()
        self._place: Any = (GROUP, VERSION, self.namespace, PLURAL)

    def own_pod(self) -> dict[str, Any]:
        """Return the pod of this process."""
        name = os.environ.get("KFP_POD_NAME") or socket.gethostname()
        with self._asking(f"read the pod {name}", "get pods"):
            answer = self._core.read_namespaced_pod(
                name, self.namespace, _preload_content=False, _request_timeout=_TIMEOUT_S
            )
            return json.loads(answer.data)

    def create(self, job: dict[str, Any]) -> bool:
        """Create a TrainJob; return whether there was none of its name."""
        runtime = job["spec"]["runtimeRef"]["name"]
        with self._asking("create a TrainJob", "create trainjobs", runtime=runtime):
            try:
                self._jobs.create_namespaced_custom_object(
                    *self._place, job, field_validation="Strict", _request_timeout=_TIMEOUT_S
                )
            except _exception() as error:
                if error.status != 409:
                    raise
                return False
            return True

    def job(self, name: str) -> dict[str, Any] | None:
        """Return a TrainJob; None if there is none."""
        with self._asking(f"read the TrainJob {name}", "get trainjobs"):
            try:
                return self._jobs.get_namespaced_custom_object(
                    *self._place, name, _request_timeout=_TIMEOUT_S
                )
            except _exception() as error:
                if error.status != 404:
                    raise
                return None

    def delete(self, name: str) -> bool:
        """Have a TrainJob end with its pods; return whether there was one."""
        with self._asking(f"delete the TrainJob {name}", "delete trainjobs"):
            try:
                self._jobs.delete_namespaced_custom_object(
                    *self._place,
                    name,
                    body={"propagationPolicy": "Foreground"},
                    _request_timeout=_TIMEOUT_S,
                )
            except _exception() as error:
                if error.status != 404:
                    raise
                return False
            return True

    def pods(self, name: str) -> dict[int, dict[str, Any]]:
        """Return the newest pod of each node of a TrainJob."""
        with self._asking("list the pods of the nodes", "list pods"):
            answer = self._core.list_namespaced_pod(
                self.namespace,
                label_selector=f"{_JOB_SET}={name}",
                _preload_content=False,
                _request_timeout=_TIMEOUT_S,
            )
            pods = json.loads(answer.data)["items"]
        pods.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
        return {int(pod["metadata"].get("labels", {}).get(_INDEX, 0)): pod for pod in pods}

    def log(self, pod: str, since_s: int | None) -> list[str]:
        """Return what a node has logged, in the last seconds or since it began; with times."""
        with self._asking(f"read the log of the pod {pod}", "get pods/log"):
            try:
                answer = self._core.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    container=NODE,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=_TIMEOUT_S,
                    **({} if since_s is None else {"since_seconds": since_s}),
                )
            except _exception() as error:
                if error.status in (400, 404):  # its container has not begun, or it is gone
                    return []
                raise
            return answer.data.decode(errors="replace").splitlines()

    @contextlib.contextmanager
    def _asking(self, what: str, verb: str, runtime: str = "") -> Iterator[None]:
        """Turn what the API refuses into one line.

        Raises:
            BusyApiError: If it makes sense to ask again.
            ClusterError: Otherwise.
        """
        from urllib3.exceptions import HTTPError

        try:
            yield
        except HTTPError as error:
            raise BusyApiError(f"the Kubernetes API cannot be reached: {error}") from None
        except _exception() as error:
            said = _message(error)
            if error.status == 429 or error.status >= 500:
                raise BusyApiError(f"the Kubernetes API answers {error.status}: {said}") from None
            raise ClusterError(self._refused(what, verb, runtime, error.status, said)) from None

    def _refused(self, what: str, verb: str, runtime: str, status: int, said: str) -> str:
        if runtime and "not found" in said and runtime in said:
            return (
                f"the cluster has no ClusterTrainingRuntime {runtime}: {said}. Install it, or name another "
                "one as cluster.training_runtime."
            )
        if status == 403 and "admission webhook" not in said:
            return (
                f"the service account of this pod must not {what} in the namespace {self.namespace}: it "
                f"lacks {verb}. Apply docker/kubernetes/base/training.yaml, with the account's name."
            )
        if status == 404 and runtime:
            return (
                f"the cluster knows no TrainJob ({GROUP}/{VERSION}). Install Kubeflow Trainer, or set "
                "training.nodes=1."
            )
        return f"Kubernetes refuses to {what} ({status}): {said}."


def _exception() -> "type[ApiException]":
    from kubernetes.client import ApiException

    return ApiException


def _message(error: "ApiException") -> str:
    """Return the message of an answer, without its end mark."""
    try:
        said = str(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        said = str(error.body or error.reason)
    return " ".join(said.split())[:500].rstrip(".")
