"""The step that measures: evaluate."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StorageError
from core.report.summary import build_phase_summary
from core.runs.gathering import collect_record
from core.runs.run import Run
from core.steps.frame import Artifact, Workspace, compute_once, tracker_of
from core.storage.layout import HELD_OUT, HTML, ITEMS, REPORT
from core.storage.publication import Publication, find_publication, open_publication
from core.storage.store import open_store
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
    summary: Artifact,
    picture: Artifact,
) -> None:
    """Measure perplexity and the benchmarks; the parent MLflow run gets one point of each series.

    Args:
        run: The run's handle.
        phase: The phase, 0 for the dense model.
        checkpoint_uri: What is measured.
        data_uri: The run's data, beside which its held-out text is published.
        summary: Gets the figures of the phase as a table (Markdown), and as its metadata.
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
        from core.evaluation.cache import AnswerCache, files_digest
        from core.evaluation.checkpoint import (
            LoadedOnce,
            load_measured,
            measure_checkpoint,
            number_of_ranks,
        )
        from core.evaluation.items import Items
        from core.evaluation.perplexity import measure_text
        from core.machine.precision import warn_if_emulated
        from core.model.build import pick_device
        from core.model.checkpoint import Checkpoint
        from core.steps.footprint import explaining_memory, planned_evaluation

        warn_if_emulated("evaluation", evaluation.precision, pick_device())
        if evaluation.perplexity is not None:
            held_out = open_publication(this.held_out_uri()).fetch(work.scratch, only=[HELD_OUT]) / HELD_OUT
        report: dict[str, Any] = {"tasks": {}}
        items = Items()
        pruned = this.phase_uri(phase, "pruned")
        trained = phase > 0 and checkpoint_uri != pruned
        directory = checkpoint.fetch(work.scratch / "checkpoint")
        settings = planned_evaluation(Checkpoint(directory).config, evaluation, pick_device().type)

        def cache_of(measured: Publication) -> AnswerCache:
            digest = files_digest(measured.manifest.files)
            return AnswerCache(store=this.store, checkpoint=digest, precision=evaluation.precision)

        def load_pruned(published: Publication) -> "PreTrainedModel":
            return load_measured(published.fetch(work.scratch / "pruned"), settings.precision)[0]

        windows = functools.partial(measure_text, batch_size=settings.batch_size)
        with explaining_memory("evaluation.batch_size=0 or lower"):
            if evaluation.perplexity is not None and trained and (before := _kept(this, pruned)) is not None:
                items.texts["perplexity_pruned"] = windows(
                    functools.partial(load_pruned, before), held_out, cache=cache_of(before)
                )
            load = LoadedOnce(directory, settings.precision)
            if evaluation.perplexity is not None:
                items.texts["perplexity"] = windows(lambda: load()[0], held_out, cache=cache_of(checkpoint))
            if evaluation.tasks and evaluation.asks_tasks(phase, phases=len(this.phase_params)):
                found = measure_checkpoint(
                    directory, settings, seed=this.settings.seed, cache=cache_of(checkpoint), model=load
                )
                report["tasks"] = found.figures
                if (ranks := number_of_ranks(settings)) > 1 and pick_device().type != "cpu":
                    report["accelerators"] = ranks
                items.tasks.update(found.items.tasks)
                items.groups.update(found.items.groups)
        report |= {name: text.metrics["perplexity"].over_all() for name, text in items.texts.items()}
        (work.out / ITEMS).write_text(items.to_json())
        return report

    def track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
        child.log_metrics(_flat(report))

    published = compute_once(
        this, this.measured_uri(phase), phase=phase, step="evaluate", compute=compute, track=track
    )
    record = collect_record(
        this, checkpoint_uri, sorted({0, max(0, phase - 1), phase}), tracker=tracker_of(this)
    )
    measured = record.phases[-1]
    series = {
        **_flat(published.read_json(REPORT)),
        "params": measured.params,
        "tokens": measured.tokens,
        "seconds": sum(measured.seconds.values()),
        **({} if measured.gpu_seconds is None else {"gpu_seconds": measured.gpu_seconds}),
    }
    tracker_of(this).log_phase(phase, series)
    summary.metadata |= series
    _write(summary, build_phase_summary(record))
    page = build_phase_report(record)
    _write(picture, page)
    tracker_of(this).log_page(page, f"phases/{phase:02d}.html")
    if 0 < phase < len(this.phase_params):
        write_report_so_far(this, phase)


def write_report_so_far(run: Run, phase: int) -> None:
    """Keep a report of the phases up to this one beside ``run.json``, until ``publish`` makes the last one.

    Nothing depends on it. Of evaluations that end in another order than they began, the furthest one counts.
    """
    from core.report.report import build_report

    try:
        if find_publication(run.measured_uri(phase + 1)) is None:
            record = collect_record(run, "", range(phase + 1))
            open_store(run.store).write_bytes(f"{run.folder}/{HTML}", build_report(record).encode())
    except StorageError as error:
        log.warning("the report so far is not written: %s", error)


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
