"""The step that measures what layers and groups are worth: calibrate."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.runs.run import Run
from core.steps.frame import (
    Artifact,
    Workspace,
    compute_once,
    hand_over,
)
from core.steps.measuring import measure
from core.storage.layout import STATISTICS
from core.tracking.mlflow import ChildRun

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


def run_calibrate(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, statistics: Artifact
) -> None:
    """Measure layer similarities and group scores of a checkpoint."""
    this = Run.load(run)

    def compute(work: Workspace) -> dict[str, Any]:
        measured = measure(this, phase, checkpoint_uri, data_uri, work.scratch)
        measured.save(work.out / STATISTICS)
        return {
            "calibration_loss": measured.loss,
            "calibration_tokens": measured.tokens,
            "similarities": measured.similarities.tolist(),
        }

    def track(child: ChildRun, report: dict[str, Any]) -> None:
        child.log_series("similarity", enumerate(report.get("similarities", ())))

    uri = this.phase_uri(phase, "calibrated")
    compute_once(this, uri, phase=phase, step="calibrate", compute=compute, track=track)
    hand_over(uri, STATISTICS, statistics)
