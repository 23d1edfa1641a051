"""The TrainJob (trainer.kubeflow.org/v1alpha1) of a phase: its nodes are as the pod of the step is.

Plain objects by way of the ``kubernetes`` client, not the ``kubeflow`` SDK: that one can give a node's
container no variables from secrets, and a TrainJob no owner, so that it would outlive a pod that is killed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from core.storage.cache import CACHE

if TYPE_CHECKING:
    from core.runs.run import Run

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""Name of the runtime's job, and of its container."""
VARIABLE = "ADAPT_PRUNER_NODES"
"""Of the step's environment: what its pod does not say of the nodes."""
COMMAND = ("python", "-m", "components.nodes.main")

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_OWN_LABELS = "adapt-pruner/"
_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
_MANAGER = "adapt-pruner/recover-train"
_MAIN = "main"  # the container of the step in a pod of Argo
_OF_OTHERS = ("ARGO_", "KFP_", "PET_", VARIABLE, CACHE)  # nodes mount no cache
_VOLUMES = ("shared-memory", "scratch")
_SCHEDULING = ("nodeSelector", "tolerations", "affinity", "imagePullSecrets", "serviceAccountName")


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What the pipeline was compiled with for the nodes.

    Attributes:
        runtime: Name of the ClusterTrainingRuntime.
        resources: Of a node, as in a container. The step's own pod has none of its accelerators; empty takes
            what that pod has.
    """

    runtime: str = "torch-distributed"
    resources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return the value of the variable."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "NodeSettings":
        """Return what the variable says, or defaults."""
        return cls(**json.loads(environment.get(VARIABLE, "{}")))


def job_name(run: "Run", phase: int) -> str:
    """Return the name of the TrainJob of a phase: whoever trains it in this store takes this one."""
    digest = hashlib.sha256(f"{run.store} {run.key}".encode()).hexdigest()[:12]
    return f"adapt-pruner-{digest}-phase-{phase}"


def train_job(
    name: str, pod: Mapping[str, Any], nodes: int, settings: NodeSettings, arguments: list[str]
) -> dict[str, Any]:
    """Return the TrainJob.

    Args:
        name: Its name.
        pod: The step's own pod, which becomes its owner.
        nodes: Number of nodes.
        settings: What the pod does not say.
        arguments: Of the process of each node.
    """
    metadata, spec = pod["metadata"], pod["spec"]
    (main,) = [container for container in spec["containers"] if container["name"] == _MAIN]
    labels = metadata.get("labels", {})
    own = {key: value for key, value in labels.items() if key.startswith(_OWN_LABELS)}
    queue = {key: value for key, value in labels.items() if key == QUEUE_LABEL}
    container = {
        "name": NODE,
        "volumeMounts": [mount for mount in main.get("volumeMounts", ()) if mount["name"] in _VOLUMES],
        "securityContext": main.get("securityContext"),
    }
    pod_patch = {
        **{key: spec.get(key) for key in _SCHEDULING},
        "securityContext": spec.get("securityContext"),
        "volumes": [volume for volume in spec.get("volumes", ()) if volume["name"] in _VOLUMES],
        "containers": [_filled(container)],
    }
    template = {
        "metadata": {"labels": own | _NO_SIDECAR, "annotations": _NO_SIDECAR},
        "spec": _filled(pod_patch),
    }
    patch = {"name": NODE, "template": {"spec": {"template": template}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": own | queue,
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
            ],
        },
        "spec": _filled(
            {
                "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": settings.runtime},
                "trainer": {
                    "image": main["image"],
                    "command": list(COMMAND),
                    "args": arguments,
                    "env": [variable for variable in main.get("env", ()) if _is_of_the_step(variable)],
                    "numNodes": nodes,
                    "resourcesPerNode": settings.resources or main.get("resources", {}),
                },
                "runtimePatches": [
                    {
                        "manager": _MANAGER,
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                    }
                ],
                "activeDeadlineSeconds": spec.get("activeDeadlineSeconds"),
            }
        ),
    }


def _is_of_the_step(variable: Mapping[str, Any]) -> bool:
    """Return whether a variable is the pipeline's, not one of KFP, of Argo or of the pod itself."""
    return not variable["name"].startswith(_OF_OTHERS) and "fieldRef" not in (variable.get("valueFrom") or {})


def _filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, [], {})}
