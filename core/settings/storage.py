"""Where a run's results go: settings of its store and its tracking server."""

import re
from dataclasses import dataclass

from core.errors import refuse


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """Where checkpoints, statistics and plans go."""

    store: str = "output/store"
    """A folder, ``file:///...`` or ``s3://bucket/prefix`` (credentials and endpoint from the environment)."""
    keep: str = "last"
    """Checkpoints to keep: ``all``, ``last``, ``best`` (lowest perplexity, and the last) or a number k (every
    k-th phase, and the last). Others are removed once no step will read them. Statistics, plans and
    manifests are always kept."""

    def __post_init__(self) -> None:
        """Check values."""
        problems = []
        if not self.store:
            problems.append("store is empty. Name a folder or s3://bucket/prefix.")
        if self.keep not in ("all", "last", "best") and not re.fullmatch("[1-9][0-9]*", self.keep):
            problems.append(f"keep={self.keep} must be all, last, best or a number k (every k-th phase).")
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Where the numbers go."""

    uri: str = ""
    """MLflow tracking URI; empty uses MLFLOW_TRACKING_URI, and without that nothing is tracked."""
    experiment: str = "adapt-pruner"
    """MLflow experiment."""
    model_name: str = ""
    """Name in MLflow's model registry for the result; empty registers nothing."""

    def __post_init__(self) -> None:
        """Check values."""
        if self.model_name.strip() != self.model_name or re.search("[/:'\"]", self.model_name):
            problem = (
                "must hold no slash, colon or quote, and no space at its ends: MLflow takes no such name."
            )
            refuse([f"model_name={self.model_name} {problem} Choose another one."])
