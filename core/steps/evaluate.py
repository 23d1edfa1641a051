"""The step that measures: evaluate."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.report.summary import build_phase_summary
from core.runs.run import Run
from core.steps.frame import Artifact, Workspace, compute_once, tracker_of
from core.steps.records import collect_record
from core.storage.layout import HELD_OUT, REPORT
from core.storage.publication import fetch, is_whole, read_published
from core.tracking.mlflow import ChildRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def run_evaluate(
    *,
    run: Mapping[str, Any],
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    metrics: Artifact,
    summary: Artifact,
    picture: Artifact,
) -> None:
    """Measure perplexity and the benchmarks; the parent MLflow run gets one point of each series.

    Args:
        run: The run's handle.
        phase: The phase, 0 for the dense model.
        checkpoint_uri: What is measured.
        data_uri: The run's data, beside which its held-out text is published.
        metrics: Gets all figures of the phase.
        summary: Gets them as a table (Markdown).
        picture: Gets the widths of all layers, the training loss and the times of the phase (HTML).
    """
    from core.report.report import build_phase_report

    this = Run.load(run)
    evaluation = this.settings.evaluation

    def compute(work: Workspace) -> dict[str, Any]:
        kept = _where_kept(this, phase, checkpoint_uri)
        if not kept:
            log.info("not measured: storage.keep=%s has kept no checkpoint", this.settings.storage.keep)
            return {"tasks": {}}
        from core.evaluation.benchmarks import evaluate_tasks
        from core.machine.precision import warn_if_emulated
        from core.model.build import dtype_of, load_model, load_tokenizer, pick_device
        from core.model.checkpoint import Checkpoint

        warn_if_emulated("evaluation", evaluation.precision, pick_device())

        def load(checkpoint: Checkpoint) -> "PreTrainedModel":
            return load_model(checkpoint, dtype=dtype_of(evaluation.precision), device=pick_device())

        report: dict[str, Any] = {}
        pruned = this.phase_uri(phase, "pruned")
        trained = phase > 0 and checkpoint_uri != pruned
        if evaluation.perplexity is not None and trained and _has_kept(this, pruned):
            report["perplexity_pruned"] = _perplexity(
                this, load(Checkpoint(fetch(pruned, work.scratch / "pruned"))), work.scratch
            )
        checkpoint = Checkpoint(fetch(kept, work.scratch / "checkpoint"))
        model = load(checkpoint)
        if evaluation.perplexity is not None:
            report["perplexity"] = _perplexity(this, model, work.scratch)
        tokenizer = load_tokenizer(checkpoint)
        return report | {"tasks": evaluate_tasks(model, tokenizer, evaluation) if evaluation.tasks else {}}

    def track(child: ChildRun, report: dict[str, Any]) -> None:
        child.log_metrics(_flat(report))

    uri = this.measured_uri(phase)
    compute_once(this, uri, phase=phase, step="evaluate", compute=compute, track=track)
    report = read_published(uri, REPORT)
    before = [
        read_published(this.phase_uri(phase, step), REPORT)
        for step in ("calibrated", "scored", "pruned", "recovered")
    ]
    figures = {
        **_flat(report),
        "params": before[1].get("params", this.dense.num_params()),
        "tokens": before[3].get("tokens", 0),
        "seconds": sum(step.get("seconds", 0.0) for step in [*before, report]),
    }
    series = {name: value for name, value in figures.items() if value is not None}
    tracker_of(this).log_phase(phase, series)
    metrics.metadata |= series
    record = collect_record(this, checkpoint_uri, sorted({0, max(0, phase - 1), phase}))
    _write(summary, build_phase_summary(record))
    _write(picture, build_phase_report(record))


def _where_kept(run: Run, phase: int, checkpoint_uri: str) -> str:
    """Return where a phase's checkpoint is; "" if a run that is done has not kept it.

    The last phase's is the final one. In any other run a file that is missing is an error where it is read.
    """
    if _has_kept(run, checkpoint_uri):
        return checkpoint_uri
    return run.uri("final") if phase == len(run.phase_params) else ""


def _has_kept(run: Run, uri: str) -> bool:
    return not Run.is_done(run.handle()) or is_whole(uri)


def _perplexity(run: Run, model: "PreTrainedModel", scratch: Path) -> float:
    """Return a model's perplexity on the run's held-out text."""
    from safetensors.torch import load_file

    from core.evaluation.perplexity import perplexity

    windows = load_file(fetch(run.held_out_uri(), scratch, only=[HELD_OUT]) / HELD_OUT)["input_ids"]
    return perplexity(model, windows, batch_size=run.settings.evaluation.batch_size)


def _write(artifact: Artifact, text: str) -> None:
    Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
    Path(artifact.path).write_text(text)


def _flat(report: Mapping[str, Any]) -> dict[str, float]:
    """Return a report's figures under the names that MLflow and the KFP UI show."""
    tasks = {
        f"{task}/{metric}": value
        for task, metrics in report.get("tasks", {}).items()
        for metric, value in metrics.items()
    }
    return {name: value for name, value in report.items() if isinstance(value, int | float)} | tasks
