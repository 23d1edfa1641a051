"""The step that measures what layers and groups are worth: calibrate."""

from collections.abc import Mapping
from typing import Any

from core.runs.run import Run
from core.steps.frame import Artifact, Workspace, compute_once, hand_over
from core.steps.measuring import PhaseMeasurement
from core.storage.layout import STATISTICS
from core.storage.publication import Publication, open_publication
from core.tracking.mlflow import ChildRun


def run_calibrate(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, statistics: Artifact
) -> None:
    """Measure layer similarities and group scores of a checkpoint."""
    this = Run.load(run)

    def compute(work: Workspace) -> dict[str, Any]:
        checkpoint, data = open_publication(checkpoint_uri), open_publication(data_uri)
        measured = PhaseMeasurement(this, phase, checkpoint, data, work.scratch).measure()
        measured.save(work.out / STATISTICS)
        return {
            "calibration_loss": measured.loss,
            "calibration_tokens": measured.tokens,
            "similarities": measured.similarities.tolist(),
        }

    def track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
        child.log_series("similarity", enumerate(report.get("similarities", ())))

    uri = this.phase_uri(phase, "calibrated")
    published = compute_once(this, uri, phase=phase, step="calibrate", compute=compute, track=track)
    hand_over(published, STATISTICS, statistics)
