"""The step that measures: evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.run import Run
from core.steps.once import Artifact, Workspace, compute_once, read_published, tracker_of
from core.storage.manifest import fetch


def run_evaluate(
    *,
    run: Mapping[str, Any],
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    metrics: Artifact,
    summary: Artifact,
) -> None:
    """Measure perplexity and the benchmarks; the parent MLflow run gets one point of each series."""
    this = Run.load(run)
    evaluation = this.settings.evaluation

    def compute(work: Workspace) -> dict[str, Any]:
        from core.evaluation.benchmarks import evaluate_tasks
        from core.model.build import dtype_of, load_model, load_tokenizer, pick_device

        folder = fetch(checkpoint_uri, work.scratch / "checkpoint")
        report: dict[str, Any] = {
            "perplexity": measure_perplexity(this, folder, data_uri, work.scratch),
            "tasks": {},
        }
        if evaluation.tasks:
            device = pick_device()
            model = load_model(folder, dtype=dtype_of(evaluation.precision), device=device)
            report["tasks"] = evaluate_tasks(model, load_tokenizer(folder), evaluation, device=device)
        work.child.log_metrics(_flat(report))
        return report

    uri = this.phase_uri(phase, "evaluated")
    compute_once(this, uri, phase=phase, step="evaluate", compute=compute)
    report = read_published(uri, "report.json")
    trained = read_published(this.phase_uri(phase, "recovered"), "report.json")
    params = read_published(this.phase_uri(phase, "scored"), "report.json").get(
        "params", this.dense.num_params()
    )
    figures = {"params": params, "perplexity_pruned": trained.get("perplexity_pruned"), **_flat(report)}
    series = {name: value for name, value in figures.items() if value is not None and name != "seconds"}
    tracker_of(this).log_phase(phase, series | {"tokens": trained.get("tokens", 0)})
    metrics.metadata |= series
    rows = "\n".join(f"| {name} | {value:,.4g} |" for name, value in series.items())
    Path(summary.path).parent.mkdir(parents=True, exist_ok=True)
    Path(summary.path).write_text(
        f"# {this.settings.name}, phase {phase}\n\n| metric | value |\n|---|---|\n{rows}\n"
    )


def measure_perplexity(run: Run, checkpoint: Path, data_uri: str, scratch: Path) -> float | None:
    """Return a checkpoint's perplexity on the run's held-out text; None where the recipe names none."""
    from safetensors.torch import load_file

    from core.evaluation.perplexity import perplexity
    from core.model.build import dtype_of, load_model, pick_device

    settings = run.settings.evaluation
    if settings.perplexity is None:
        return None
    name = "perplexity.safetensors"
    windows = load_file(fetch(data_uri, scratch, only=[name]) / name)["input_ids"]
    model = load_model(checkpoint, dtype=dtype_of(settings.precision), device=pick_device())
    return perplexity(model, windows, batch_size=settings.batch_size)


def _flat(report: Mapping[str, Any]) -> dict[str, float]:
    """Return a report's figures under the names that MLflow and the KFP UI show."""
    tasks = {
        f"{task}/{metric}": value
        for task, metrics in report.get("tasks", {}).items()
        for metric, value in metrics.items()
    }
    return {name: value for name, value in report.items() if isinstance(value, int | float)} | tasks
