"""The step after the last phase: publish."""

import contextlib
import dataclasses
import fnmatch
import html
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ExportError
from core.report.summary import build_description
from core.runs.gathering import collect_record
from core.runs.record import RunRecord, SpeedRecord, accuracies, headline_metric
from core.runs.run import Run
from core.scratch import scratch_folder
from core.steps.frame import (
    Artifact,
    Workspace,
    base_facts,
    compute_once,
    describe_checkpoint,
    hand_over,
    tracker_of,
)
from core.storage.layout import CARD, HTML, RECORD, REPORT
from core.storage.publication import Publication, open_publication
from core.storage.store import open_store
from core.tracking.mlflow import ChildRun
from core.tracking.presentation import perplexity_set, summary_params
from core.tracking.registry import EVALUATED, MEASURED, register

log = logging.getLogger(__name__)


def run_publish(
    *, run: Mapping[str, Any], checkpoint_uri: str, result: Artifact, report: Artifact, model: Artifact
) -> str:
    """Publish the final checkpoint with its record and report, and register it.

    Args:
        run: The run's handle.
        checkpoint_uri: What the last phase ends with.
        result: Gets the figures by which runs are compared: KFP shows them side by side, a column a run.
        report: Gets the report.
        model: Describes the final checkpoint.

    Returns:
        URI of the final checkpoint.
    """
    this = Run.load(run)
    uri, report_uri, phases = this.uri("final"), this.report_uri(), len(this.phase_params)

    def write_report(folder: Path, base: Publication, work: Workspace) -> RunRecord:
        from core.report.report import build_report

        record = collect_record(
            this, uri, range(phases + 1), tracker=tracker_of(this)
        )  # asks MLflow, which may be away
        record = dataclasses.replace(record, speed=_measure_speed(this, folder, base, work))
        (work.out / RECORD).write_text(json.dumps(record.to_dict()))
        (work.out / HTML).write_text(build_report(record))
        return record

    def measure_again(work: Workspace) -> dict[str, Any]:
        folder, base = (
            open_publication(uri).fetch(work.scratch / "checkpoint"),
            open_publication(this.base_uri),
        )
        return {"params": write_report(folder, base, work).phases[-1].params}

    def compute(work: Workspace) -> dict[str, Any]:
        checkpoint, base = open_publication(checkpoint_uri), open_publication(this.base_uri)
        folder = checkpoint.fetch(work.scratch / "checkpoint")
        record = write_report(folder, base, work)
        for path in checkpoint.manifest.paths:
            if path != REPORT:
                (work.out / path).parent.mkdir(parents=True, exist_ok=True)
                (work.out / path).symlink_to((folder / path).resolve())
        _write_card(base, record, work)
        return {"params": record.phases[-1].params}

    def track(_: ChildRun, __: dict[str, Any], published: Publication) -> None:
        with scratch_folder() as scratch:
            tracker_of(this).log_report(published.fetch(scratch, only=[HTML]) / HTML)

    work = compute if report_uri == uri else measure_again
    published = compute_once(this, report_uri, phase=phases, step="publish", compute=work, track=track)
    hand_over(published, HTML, report)
    describe_checkpoint(published if report_uri == uri else open_publication(uri), model)
    record = RunRecord.from_dict(published.read_json(RECORD))
    result.metadata |= _headlines(record)
    speedups = {name: value for speed in record.speed for name, value in speed.figures().items()}
    tracker_of(this).log_phase(phases, speedups)
    with this.working():
        tracker_of(this).describe(build_description(record))
        if (version := _register(this, uri, record)) and this.settings.registry.promote == "rule":
            _promote(this, version, record, report, model)
        open_store(this.store).delete(f"{this.folder}/{HTML}")  # the report so far
        this.mark_done()
    return uri


def _headlines(record: RunRecord) -> dict[str, float]:
    """Return what a run has come to: its size, its quality, and what it took."""
    dense, last = record.phases[0], record.phases[-1]
    found = {"parameters": last.params, "share of parameters": last.params / dense.params}
    if last.perplexity is not None:
        found["perplexity"] = last.perplexity
    scores = {task: headline_metric(metrics) for task, metrics in last.tasks.items()}
    measured = {f"{task} {score[0]}": score[1] for task, score in scores.items() if score is not None}
    if len(right := accuracies(last).values()) > 1:  # neither perplexities nor a preset's own average
        found["mean accuracy"] = sum(right) / len(right)
    found |= measured
    found["training tokens"] = sum(phase.tokens for phase in record.phases)
    found["hours"] = sum(sum(phase.seconds.values()) for phase in record.phases) / 3600
    return found | {name: value for speed in record.speed for name, value in speed.figures().items()}


def _register(run: Run, uri: str, record: RunRecord) -> str:
    """Register the final checkpoint as a version of ``tracking.model_name``, if the settings name one."""
    name = run.settings.tracking.model_name
    if not name:
        return ""
    texts = perplexity_set(run.settings)
    version = register(
        tracker_of(run),
        name,
        uri,
        params={"base": record.base, "run": run.key, **summary_params(run.settings)},
        phase=len(run.phase_params),
        tags={
            MEASURED: run.settings.measured_digest(),
            EVALUATED: run.measured_uri(len(run.phase_params)),
        },
        data_set=(texts.name, texts.digest) if texts else None,
    )
    if version:
        log.info("registered %s version %s", name, version)
    return version


def _promote(run: Run, version: str, record: RunRecord, report: Artifact, model: Artifact) -> None:
    """Let the rule decide whether the version becomes the champion, and show it in KFP and MLflow."""
    from core.steps.promotion import promote
    from core.tracking.registry import Registry

    tracker = tracker_of(run)
    registry = Registry(tracker.uri, run.settings.tracking.model_name)
    decision = promote(registry, run.settings.registry, version, again=False)
    log.info("%s", decision.sentence)
    model.metadata["decision"] = decision.sentence
    page, said = Path(report.path).read_text(), html.escape(f"{registry.name}: {decision.sentence}")
    Path(report.path).write_text(page.replace("<main>", f"<main>\n<section><p>{said}</p></section>", 1))
    tracker.describe(f"{build_description(record)}\n{registry.name}: {decision.sentence}\n")


def _write_card(base: Publication, record: RunRecord, work: Workspace) -> None:
    """Write the model card, and put the base model's licence files beside it."""
    from core.model.checkpoint import LEGAL
    from core.report.card import model_card

    legal = [path for path in base.manifest.paths if any(fnmatch.fnmatch(path, name) for name in LEGAL)]
    if legal:
        folder = base.fetch(work.scratch / "legal", only=legal)
        for name in legal:
            if not (work.out / name).exists():
                (work.out / name).symlink_to((folder / name).resolve())
    card = model_card(
        record,
        config=json.loads((work.out / "config.json").read_text()),
        licence=base_facts(base),
        legal_files=legal,
        formats=_formats(work.out),
    )
    (work.out / CARD).write_text(card)


def _formats(checkpoint: Path) -> list[str]:
    """Return the formats of other runtimes that hold a checkpoint's sizes."""
    from core.export.decilm import decilm_obstacle
    from core.export.gguf_layout import architecture_of
    from core.export.padded import pads_biases
    from core.model.checkpoint import Checkpoint
    from core.model.config import sliced_width
    from core.model.remote_code import needs_code

    opened = Checkpoint(checkpoint)
    padded = needs_code(opened.config) and pads_biases(opened.config) and not sliced_width(opened.config)
    formats = ["padded"] if padded else []
    if decilm_obstacle(opened.config) is None:
        formats.append("decilm")
    with contextlib.suppress(ExportError):
        architecture_of(opened.config, opened.layers)
        formats.append("gguf")
    return formats


def _measure_speed(run: Run, checkpoint: Path, base: Publication, work: Workspace) -> tuple[SpeedRecord, ...]:
    """Measure the result against the base model, if the settings ask for it."""
    if not run.settings.evaluation.speed:
        return ()
    from core.model.build import pick_device
    from core.steps.speed import BRIEF, compare_speed

    folder = base.fetch(work.scratch / "base")
    return compare_speed(folder, checkpoint, BRIEF, device=pick_device().type)
