"""The step that measures what layers and groups are worth: calibrate."""

from collections.abc import Mapping
from typing import Any

from core.runs.run import Run
from core.steps.frame import Artifact, Workspace, compute_once, hand_over
from core.steps.measuring import PhaseMeasurement
from core.storage.interface import join_uri
from core.storage.layout import RESUME, STATISTICS
from core.storage.publication import Publication, open_publication
from core.tracking.mlflow import ChildRun
from core.training.resume import remove_states


def run_calibrate(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, statistics: Artifact
) -> None:
    """Measure layer similarities and group scores of a checkpoint.

    Where that takes longer than some minutes, a task that was killed and is started again goes on after the
    last layers that were kept.
    """
    this = Run.load(run)
    uri = this.phase_uri(phase, "calibrated")

    def compute(work: Workspace) -> dict[str, Any]:
        checkpoint, data = open_publication(checkpoint_uri), open_publication(data_uri)
        measurement = PhaseMeasurement(this, phase, checkpoint, data, work.scratch)
        with measurement.stages(join_uri(uri, RESUME)) as stages:
            measured = measurement.measure(0, stages)
        measured.save(work.out / STATISTICS)
        return {
            "seconds": stages.earlier_s,
            "calibration_loss": measured.loss,
            "calibration_tokens": measured.tokens,
            "similarities": measured.similarities.tolist(),
        }

    def track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
        child.log_series("similarity", enumerate(report.get("similarities", ())))

    published = compute_once(this, uri, phase=phase, step="calibrate", compute=compute, track=track)
    remove_states(join_uri(uri, RESUME))
    hand_over(published, STATISTICS, statistics)
