"""The step that measures: evaluate."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.report.summary import build_phase_summary
from core.runs.run import Run
from core.settings.evaluation import EvaluationSettings
from core.steps.frame import Artifact, Workspace, compute_once, tracker_of
from core.steps.records import collect_record
from core.storage.layout import HELD_OUT, REPORT
from core.storage.publication import Publication, find_publication, open_publication
from core.tracking.mlflow import ChildRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.model.checkpoint import Checkpoint

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
        checkpoint = _kept(this, checkpoint_uri)
        if checkpoint is None and phase == len(this.phase_params):
            checkpoint = open_publication(this.uri("final"))
        if checkpoint is None:
            log.info("not measured: storage.keep=%s has kept no checkpoint", this.settings.storage.keep)
            return {"tasks": {}}
        from core.evaluation.benchmarks import evaluate_tasks
        from core.machine.precision import warn_if_emulated
        from core.model.build import load_tokenizer, pick_device
        from core.model.checkpoint import Checkpoint
        from core.steps.footprint import explaining_memory, planned_evaluation

        warn_if_emulated("evaluation", evaluation.precision, pick_device())
        if evaluation.perplexity is not None:
            held_out = open_publication(this.held_out_uri()).fetch(work.scratch, only=[HELD_OUT])
        report: dict[str, Any] = {}
        pruned = this.phase_uri(phase, "pruned")
        trained = phase > 0 and checkpoint_uri != pruned
        measured = Checkpoint(checkpoint.fetch(work.scratch / "checkpoint"))
        settings = planned_evaluation(measured.config, evaluation, pick_device().type)
        with explaining_memory("evaluation.batch_size=0 or lower"):
            if evaluation.perplexity is not None and trained and (before := _kept(this, pruned)) is not None:
                model = _load(this, Checkpoint(before.fetch(work.scratch / "pruned")))
                report["perplexity_pruned"] = _perplexity(model, held_out, settings)
            model = _load(this, measured)
            if evaluation.perplexity is not None:
                report["perplexity"] = _perplexity(model, held_out, settings)
            wanted = evaluation.tasks and evaluation.asks_tasks(phase, phases=len(this.phase_params))
            tokenizer = load_tokenizer(measured)
            return report | {"tasks": evaluate_tasks(model, tokenizer, settings) if wanted else {}}

    def track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
        child.log_metrics(_flat(report))

    published = compute_once(
        this, this.measured_uri(phase), phase=phase, step="evaluate", compute=compute, track=track
    )
    record = collect_record(this, checkpoint_uri, sorted({0, max(0, phase - 1), phase}))
    measured = record.phases[-1]
    series = {
        **_flat(published.read_json(REPORT)),
        "params": measured.params,
        "tokens": measured.tokens,
        "seconds": sum(measured.seconds.values()),
    }
    tracker_of(this).log_phase(phase, series)
    metrics.metadata |= series
    _write(summary, build_phase_summary(record))
    _write(picture, build_phase_report(record))


def _kept(run: Run, uri: str) -> Publication | None:
    """Return a checkpoint; None if the run has not kept it.

    A file that is missing of one that this run should have measured before is an error where it is read.
    """
    measured = run.settings.measured_digest()
    published = find_publication(uri) if Run.is_done(run.handle()) else open_publication(uri)
    if published is None or published.is_whole():
        return published
    done = Run.is_done(run.handle()) or published.manifest.metadata.get("measured") != measured
    return None if done else published


def _load(run: Run, checkpoint: "Checkpoint") -> "PreTrainedModel":
    from core.model.build import dtype_of, load_model, pick_device

    return load_model(checkpoint, dtype=dtype_of(run.settings.evaluation.precision), device=pick_device())


def _perplexity(model: "PreTrainedModel", held_out: Path, settings: EvaluationSettings) -> float:
    """Return a model's perplexity on the run's held-out text, which is in the folder ``held_out``."""
    from safetensors.torch import load_file

    from core.evaluation.perplexity import perplexity

    windows = load_file(held_out / HELD_OUT)["input_ids"]
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
