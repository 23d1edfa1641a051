"""Where a run takes place: settings of its store, its tracking server and its cluster."""

import re
from dataclasses import dataclass

from core.errors import refuse
from core.quantities import in_range


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """Where checkpoints, statistics and plans go."""

    store: str = "output/store"
    """A folder, ``file:///...`` or ``s3://bucket/prefix`` (credentials and endpoint from the environment)."""
    keep: str = "last"
    """Which checkpoints stay when a run is done: ``all``, ``last``, ``best`` (lowest perplexity, and the
    last) or a number k (every k-th phase, and the last). Statistics, plans and manifests always stay."""

    def __post_init__(self) -> None:
        """Check values."""
        problems = []
        if not self.store:
            problems.append("store is empty. Name a folder or s3://bucket/prefix.")
        if self.keep not in ("all", "last", "best") and not re.fullmatch("[1-9][0-9]*", self.keep):
            problems.append(
                f"keep={self.keep} must be all, last, best or a number k (every k-th phase). Choose one."
            )
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Where the numbers go."""

    uri: str = ""
    """MLflow tracking URI; empty takes MLFLOW_TRACKING_URI, and without that nothing is tracked."""
    experiment: str = "adapt-pruner"
    """MLflow experiment."""
    model_name: str = ""
    """Name in MLflow's model registry for the result; empty registers nothing."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How tasks run in pods; ignored by local runs."""

    image: str = "docker.io/library/adapt-pruner-python:0.1.0"
    """The container image of all tasks, digest-pinned in production."""
    gpu_type: str = "nvidia.com/gpu"
    """Resource name of an accelerator."""
    gpus: int = 1
    """Accelerators of each GPU task (calibrate, recover-train, evaluate)."""
    cpu: str = "4"
    """CPU request of each task."""
    memory: str = "32Gi"
    """Memory request and limit of each task."""
    secret: str = "adapt-pruner"
    """Kubernetes secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, HF_TOKEN."""
    config_map: str = "adapt-pruner"
    """Kubernetes config map with AWS_ENDPOINT_URL, AWS_REGION and MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        """Check ranges."""
        refuse(in_range("gpus", self.gpus, 0, 64))
