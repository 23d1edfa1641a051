"""The step that measures: evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.run import Run
from core.steps.once import Artifact, Workspace, compute_once, read_published, tracker_of
from core.steps.records import collect_record
from core.storage.manifest import fetch
from core.tracking.mlflow import ChildRun
from core.tracking.summary import build_phase_summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        data_uri: The run's data, with the held-out text.
        metrics: Gets all figures of the phase.
        summary: Gets them as a table (Markdown).
        picture: Gets the widths of all layers, the training loss and the times of the phase (HTML).
    """
    from core.tracking.report import build_phase_report

    this = Run.load(run)
    evaluation = this.settings.evaluation

    def compute(work: Workspace) -> dict[str, Any]:
        from core.evaluation.benchmarks import evaluate_tasks
        from core.model.build import dtype_of, load_model, load_tokenizer, pick_device
        from core.precision import warn_if_emulated

        warn_if_emulated("evaluation", evaluation.precision, pick_device())
        folder = fetch(checkpoint_uri, work.scratch / "checkpoint")
        model = load_model(folder, dtype=dtype_of(evaluation.precision), device=pick_device())
        report: dict[str, Any] = {
            "perplexity": measure_perplexity(this, model, data_uri, work.scratch),
            "tasks": evaluate_tasks(model, load_tokenizer(folder), evaluation) if evaluation.tasks else {},
        }
        return report

    def track(child: ChildRun, report: dict[str, Any]) -> None:
        child.log_metrics(_flat(report))

    uri = this.phase_uri(phase, "evaluated")
    compute_once(this, uri, phase=phase, step="evaluate", compute=compute, track=track)
    report = read_published(uri, "report.json")
    before = [
        read_published(this.phase_uri(phase, step), "report.json")
        for step in ("calibrated", "scored", "pruned", "recovered")
    ]
    figures = {
        **_flat(report),
        "params": before[1].get("params", this.dense.num_params()),
        "perplexity_pruned": before[3].get("perplexity_pruned"),
        "tokens": before[3].get("tokens", 0),
        "seconds": sum(step.get("seconds", 0.0) for step in [*before, report]),
    }
    series = {name: value for name, value in figures.items() if value is not None}
    tracker_of(this).log_phase(phase, series)
    metrics.metadata |= series
    record = collect_record(this, checkpoint_uri, sorted({0, max(0, phase - 1), phase}))
    _write(summary, build_phase_summary(record))
    _write(picture, build_phase_report(record))


def measure_perplexity(run: Run, model: "PreTrainedModel", data_uri: str, scratch: Path) -> float | None:
    """Return a model's perplexity on the run's held-out text; None where the recipe names none."""
    from safetensors.torch import load_file

    from core.evaluation.perplexity import perplexity

    settings = run.settings.evaluation
    if settings.perplexity is None:
        return None
    name = "perplexity.safetensors"
    windows = load_file(fetch(data_uri, scratch, only=[name]) / name)["input_ids"]
    return perplexity(model, windows, batch_size=settings.batch_size)


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
