"""A stand-in for the Kubernetes API on a loopback port, with the TrainJobs of Kubeflow Trainer 2.3.

It is as strict as the real one, or stricter: bodies are read by the fields of the CRD and of Kubernetes' own
models, what Trainer's webhook refuses is refused, and nobody may do what the Role in ``docker/kubernetes``
does not allow. Who makes a TrainJob run is the test: ``act`` is called with it at each look.
"""

import contextlib
import copy
import http.server
import json
import re
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes.client import models as kubernetes_models

from components.nodes.train_job import VARIABLE
from tests.support.manifests import MANIFESTS
from tests.support.openapi import misfits

NAMESPACE = "team"
TRAINJOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
OWN = "adapt-pruner-x-system-container-impl-1"
_SECRET = {"secretKeyRef": {"name": "adapt-pruner", "key": "HF_TOKEN", "optional": True}}
POD = {
    "metadata": {
        "name": OWN,
        "uid": "0-0-4-2",
        "labels": {
            "adapt-pruner/component": "recover-train",
            "pipeline/runid": "r",
            "kueue.x-k8s.io/queue-name": "gpus",
        },
    },
    "spec": {
        "serviceAccountName": "default-editor",
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
        "activeDeadlineSeconds": 86400,
        "securityContext": {},
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "500Gi"}},
            {"name": "var-run-argo", "emptyDir": {}},
        ],
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {
                "name": "main",
                "image": "registry/adapt-pruner@sha256:1",
                "env": [
                    {"name": "KFP_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
                    {"name": "ARGO_TEMPLATE", "value": "{}"},
                    {"name": "PET_NNODES", "value": "9"},
                    {"name": VARIABLE, "value": "{}"},
                    {"name": "HTTPS_PROXY", "value": "http://proxy"},
                    {"name": "HF_TOKEN", "valueFrom": _SECRET},
                ],
                "resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "4Gi"}},
                "volumeMounts": [
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                    {"name": "scratch", "mountPath": "/scratch"},
                    {"name": "var-run-argo", "mountPath": "/var/run/argo"},
                ],
                "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 0},
            },
        ],
    },
}
"""The pod of the step that makes the TrainJob, as the API gives it."""

# As in the package kubeflow_trainer_api 2.3.0, without initializers; a required field ends in "!".
_FIELDS = {
    "TrainJob": "apiVersion:str! kind:str! metadata:V1ObjectMeta! spec:TrainJobSpec!",
    "TrainJobSpec": "activeDeadlineSeconds:int managedBy:str runtimePatches:list[RuntimePatch] "
    "runtimeRef:RuntimeRef! suspend:bool trainer:Trainer",
    "RuntimeRef": "apiGroup:str kind:str name:str!",
    "Trainer": "args:list[str] command:list[str] env:list[V1EnvVar] image:str numNodes:int "
    "numProcPerNode:int resourcesPerNode:V1ResourceRequirements",
    "RuntimePatch": "manager:str! time:datetime trainingRuntimeSpec:TrainingRuntimeSpecPatch",
    "TrainingRuntimeSpecPatch": "template:JobSetTemplatePatch",
    "JobSetTemplatePatch": "metadata:V1ObjectMeta spec:JobSetSpecPatch",
    "JobSetSpecPatch": "replicatedJobs:list[ReplicatedJobPatch]",
    "ReplicatedJobPatch": "name:str! template:JobTemplatePatch",
    "JobTemplatePatch": "metadata:V1ObjectMeta spec:JobSpecPatch",
    "JobSpecPatch": "template:PodTemplatePatch",
    "PodTemplatePatch": "metadata:V1ObjectMeta spec:PodSpecPatch",
    "PodSpecPatch": "affinity:V1Affinity containers:list[ContainerPatch] "
    "imagePullSecrets:list[V1LocalObjectReference] initContainers:list[ContainerPatch] "
    "nodeSelector:dict(str,str) schedulingGates:list[V1PodSchedulingGate] "
    "securityContext:V1PodSecurityContext serviceAccountName:str terminationGracePeriodSeconds:int "
    "tolerations:list[V1Toleration] volumes:list[V1Volume]",
    "ContainerPatch": "env:list[V1EnvVar] name:str! securityContext:V1SecurityContext "
    "volumeMounts:list[V1VolumeMount]",
}


def _model(fields):
    split = [text.rstrip("!").partition(":") for text in fields.split()]
    required = {text.partition(":")[0] for text in fields.split() if text.endswith("!")}

    def check(self, **given):
        if missing := required - given.keys():
            raise ValueError(f"{sorted(missing)} must not be None")

    kinds = {name: kind.replace("(str,", "(str, ") for name, _, kind in split}
    return type(
        "Model", (), {"__init__": check, "openapi_types": kinds, "attribute_map": {n: n for n in kinds}}
    )


MODELS = types.SimpleNamespace(**vars(kubernetes_models), **{k: _model(v) for k, v in _FIELDS.items()})


class Refused(Exception):
    """What the API answers instead of what it was asked for."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def role() -> set[str]:
    """What the Role of the manifests allows: a verb and a resource each."""
    (found,) = [
        each
        for each in yaml.safe_load_all((MANIFESTS / "base" / "training.yaml").read_text())
        if each["kind"] == "Role"
    ]
    return {
        f"{verb} {resource}"
        for rule in found["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@dataclass(kw_only=True)
class TrainerApi:
    """A running stand-in, and all that it keeps."""

    address: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    """By pod; each line begins with its time."""
    allowed: set[str] = field(default_factory=role)
    runtimes: tuple[str, ...] = ("torch-distributed",)
    installed: bool = True
    act: Callable[[dict[str, Any]], None] = lambda job: None
    """Called with a TrainJob before it is read: changes its status, and the pods."""
    hook: Callable[[str], None] = lambda request: None
    """Called with each request (``GET trainjobs``) before it is answered; may raise ``Refused``."""
    requests: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> Any:
        place, _, rest = (path + "/").partition("/trainjobs/" if "/trainjobs" in path else "/pods/")
        name, _, sub = rest.strip("/").partition("/")
        kind = "trainjobs" if place.startswith("/apis/") else "pods"
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[method]
        self.requests.append(f"{verb} {kind}" + (f"/{sub}" if sub else ""))
        self.hook(self.requests[-1])
        if place != (TRAINJOBS if kind == "trainjobs" else PODS).rpartition("/")[0]:
            raise Refused(404, "the server could not find the requested resource")
        if kind == "trainjobs" and not self.installed:
            raise Refused(404, "page not found")
        if self.requests[-1] not in self.allowed:
            user = f"system:serviceaccount:{NAMESPACE}:default-editor"
            raise Refused(403, f'{kind} is forbidden: User "{user}" cannot {verb} resource "{kind}"')
        if kind == "pods":
            return self._pods(name, sub, query)
        if method == "POST":
            return self._create(json.loads(body), query)
        if name not in self.jobs:
            raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        job = self.jobs[name]
        if method == "DELETE":
            assert json.loads(body) == {"propagationPolicy": "Foreground"}
            job["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
            job["looks"] = 2  # at it, until its pods have ended
            return {"kind": "Status", "status": "Success"}
        if "deletionTimestamp" in job["metadata"]:
            job["looks"] -= 1
            if not job["looks"]:
                del self.jobs[name]
                raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        else:
            self.act(job)
        return {key: value for key, value in job.items() if key != "looks"}

    def _pods(self, name: str, sub: str, query: dict[str, str]) -> Any:
        if not name:
            label, _, value = query.pop("labelSelector").partition("=")
            assert not query
            return {"items": [p for p in self.pods.values() if p["metadata"]["labels"].get(label) == value]}
        if name not in self.pods:
            raise Refused(404, f'pods "{name}" not found')
        if not sub:
            return self.pods[name]
        assert (query.pop("container"), query.pop("timestamps")) == ("node", "True")
        if name not in self.logs:
            raise Refused(400, f'container "node" in pod "{name}" is waiting to start: ContainerCreating')
        return "".join(f"{line}\n" for line in self.logs[name])  # of sinceSeconds, more than was asked for

    def _create(self, body: dict[str, Any], query: dict[str, str]) -> Any:
        assert query == {"fieldValidation": "Strict"}
        for problem in misfits(MODELS, "TrainJob", body, "TrainJob"):
            raise Refused(400, f"TrainJob in version v1alpha1 cannot be handled: strict decoding: {problem}")
        name, spec = body["metadata"]["name"], body["spec"]
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", name):
            raise Refused(422, f"metadata.name {name} is no name that its pods could have")
        if name in self.jobs:
            raise Refused(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        for problem in self._denied(spec):
            webhook = "validator.trainjob.trainer.kubeflow.org"
            raise Refused(403, f'admission webhook "{webhook}" denied the request: {problem}')
        uids = {pod["metadata"].get("uid") for pod in self.pods.values()}
        assert {owner["uid"] for owner in body["metadata"]["ownerReferences"]} <= uids, "removed as an orphan"
        self.jobs[name] = body | {"status": {}}
        self.created.append(copy.deepcopy(body))
        return body

    def _denied(self, spec: dict[str, Any]) -> Iterator[str]:
        runtime = spec["runtimeRef"]
        if runtime["kind"] != "ClusterTrainingRuntime" or runtime["name"] not in self.runtimes:
            yield (
                f'spec.runtimeRef: Invalid value: {runtime}: clustertrainingruntimes "{runtime["name"]}" not '
                "found: specified clusterTrainingRuntime must be created before the TrainJob is created"
            )
        if any(variable["name"].startswith("PET_") for variable in spec["trainer"].get("env", ())):
            yield "spec.trainer.env: must not have reserved envs"
        for patch in spec.get("runtimePatches", ()):
            if not re.fullmatch(r"[a-z0-9.-]+/[a-z0-9./-]+", patch["manager"]):
                yield "spec.runtimePatches.manager: must be a domain-prefixed path"
            for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
                if job["name"] != "node":
                    yield "must not have targetJob that doesn't exist in the runtime job template"
                for container in job["template"]["spec"]["template"]["spec"].get("containers", ()):
                    if container["name"] != "node" or container.get("env"):
                        yield "must not have envs for the node containers, nor others than the runtime's"


def finished(job: dict[str, Any], kind: str, reason: str = "AllJobsCompleted", message: str = "done") -> None:
    """Give a TrainJob the condition that it has ended."""
    condition = {"type": kind, "status": "True", "reason": reason, "message": message}
    job["status"] = {"conditions": [condition | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}


def pod_of(job: dict[str, Any], node: int, phase: str, **status: Any) -> dict[str, Any]:
    """The pod of a node, as Trainer, JobSet and the job make it."""
    name = job["metadata"]["name"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(node)}
    metadata = {"name": f"{name}-node-0-{node}-x7", "labels": labels}
    return {"metadata": metadata, "status": {"phase": phase} | status}


@contextlib.contextmanager
def serving(**given: Any) -> Iterator[TrainerApi]:
    """Serve on a free port of loopback."""
    api, lock = TrainerApi(**given), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            split = urlsplit(self.path)
            query = {key: value for key, (value,) in parse_qs(split.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                with lock:
                    status, said = 200, api.answer(self.command, split.path, query, body)
            except Refused as refused:
                said = {"kind": "Status", "code": refused.status, "message": refused.message}
                status = refused.status
            content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(said, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
