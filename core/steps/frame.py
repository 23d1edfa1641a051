"""The frame of every step: compute once, publish, then track; a rerun finds what is published."""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from core.bases.licence import card_facts, known_facts
from core.runs.record import public_path
from core.runs.run import Run
from core.scratch import scratch_folder
from core.settings.addresses import base_name
from core.steps.dropped import drop_checkpoints
from core.steps.opening import show_life
from core.storage.layout import CARD, REPORT, REPORT_FORMAT
from core.storage.owner import Owner
from core.storage.publication import Publication, find_publication, open_publication, publish
from core.tracking.mlflow import ChildRun, Tracker, open_tracker
from core.tracking.presentation import origin_tags, run_title

log = logging.getLogger(__name__)


class Artifact(Protocol):
    """What a KFP artifact offers; the steps know no more of KFP."""

    path: str
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where a step works.

    Attributes:
        out: Empty folder; what is in it when the step returns is published.
        scratch: Folder for downloads, removed afterwards.
        child: The step's MLflow run.
    """

    out: Path
    scratch: Path
    child: ChildRun


Track = Callable[[ChildRun, dict[str, Any], Publication], None]
"""Logs onto a step's MLflow run what there is beside the numbers of its report: gets that and its result."""


def compute_once(
    run: Run,
    uri: str,
    *,
    phase: int,
    step: str,
    compute: Callable[[Workspace], dict[str, Any]],
    track: Track | None = None,
    whole: bool = True,
) -> Publication:
    """Compute and publish a step's result, unless it is published already, and then log its figures.

    While it computes it holds the run's lease. MLflow gets what is published: a step that fails there, or is
    killed before it has logged all, logs when it is run again, and computes nothing.

    Args:
        run: The run.
        uri: Where the result goes.
        phase: Phase of the step, 0 for the dense model and for what comes before all phases.
        step: Name of the step.
        compute: Fills ``out`` and returns figures to keep beside it in ``report.json``; ``seconds`` are what
            earlier attempts have given to the result; ``accelerators`` are how many it took, by default
            whether this process has used one. Its numbers are logged.
        track: Logs what else there is.
        whole: Whether it is all that its task does; a part of it that is done says so in other words.

    Raises:
        LeaseError: If another execution works on the run.
        TrackingError: If MLflow fails, before anything is computed or after it was published.
    """
    tracker = tracker_of(run)
    published = find_publication(uri)
    if published is not None:
        log.info("already done" if whole else f"its part {step} was done before")
        show_life(run.handle())  # a run that finds much of it done works for longer than its lease lasts
        if not tracker.is_logged(phase, step):
            with tracker.child(phase, step) as child:
                _log_published(published, child, track)
        return published
    log.debug("computing %s", uri)
    started = time.monotonic()
    with run.working() as renew_lease, scratch_folder() as folder:
        out, scratch = folder / "out", folder / "scratch"
        out.mkdir()
        scratch.mkdir()
        with tracker.child(phase, step) as child:
            report = compute(Workspace(out=out, scratch=scratch, child=child))
            report["seconds"] = report.get("seconds", 0.0) + time.monotonic() - started
            report.setdefault("accelerators", _accelerators())
            (out / REPORT).write_text(json.dumps({"format": REPORT_FORMAT, **report}))
            renew_lease()  # what a machine has computed before it was asleep may be another's by now
            metadata = {"run": run.key, "phase": phase, "step": step}
            metadata["measured"] = run.settings.measured_digest()  # what it was published under
            published = publish(out, uri, metadata=metadata)
            drop_checkpoints(run)
            _log_published(published, child, track)
            return published


def _accelerators() -> int:
    """Return how many accelerators this process uses: one from the first time on, a process a step."""
    torch = sys.modules.get("torch")
    return int(torch is not None and torch.cuda.is_initialized())


def _log_published(published: Publication, child: ChildRun, track: Track | None) -> None:
    report = published.read_json(REPORT)
    child.log_metrics({name: value for name, value in report.items() if isinstance(value, int | float)})
    if track is not None:
        track(child, report, published)


def track_curves(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
    """Log the curves of a training; see ``Track``."""
    from core.training.measures import curves_of  # torch

    for name, points in curves_of(report.get("losses", ()), report.get("series", {})).items():
        child.log_series(name, points)


def tracker_of(run: Run) -> Tracker:
    """Return the tracker of a run."""
    # What is measured otherwise is another run there: no figure in MLflow ever changes.
    key = f"{run.key}-{run.settings.measured_digest()}"
    origin = origin_tags(job=run.job, local=Owner.of(run.job).pid is not None)
    return open_tracker(run.settings.tracking, key=key, name=run_title(run.settings), tags=origin)


def provenance_of(run: Run, phase: int, source: str, *, step: str) -> dict[str, Any]:
    """Return what a checkpoint's ``adapt_pruner.json`` says of how it was made.

    Args:
        run: The run.
        phase: The phase.
        source: Digest of the checkpoint that it was made from.
        step: The step that makes it.

    Returns:
        Where it comes from, and what the base model states of its licence.
    """
    return {
        **base_facts(open_publication(run.base_uri)),
        "run": run.key,
        "phase": phase,
        "step": step,
        "base": public_path(base_name(run.settings.model.base)),  # a checkpoint is handed on
        "revision": run.revision,
        "source": source,
        "settings": run.settings.digest(),
    }


def base_facts(base: Publication) -> dict[str, Any]:
    """Return what the base model of a run states of its licence and languages."""
    from core.model.checkpoint import PROVENANCE  # torch

    facts = known_facts(base.read_json(PROVENANCE)) if PROVENANCE in base.manifest.paths else {}
    # A publication that was named as the base may have a card alone.
    if not facts and CARD in base.manifest.paths:
        with scratch_folder() as scratch:
            return card_facts(base.fetch(scratch, only=[CARD]) / CARD)
    return facts


def hand_over(published: Publication, name: str, artifact: Artifact) -> None:
    """Copy a published file into a KFP artifact, for lineage and the UI; no step reads it there."""
    Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
    Path(artifact.path).write_bytes(published.read_bytes(name))
    artifact.metadata["uri"] = published.uri


def describe_checkpoint(published: Publication, artifact: Artifact) -> None:
    """Put a checkpoint's address and manifest into a KFP artifact; the weights stay in the store."""
    manifest = published.manifest
    Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
    listed = {"checkpoint_uri": published.uri, **json.loads(manifest.to_json())}
    Path(artifact.path).write_text(json.dumps(listed, indent=1))  # the UI shows the first lines
    artifact.metadata |= {
        "checkpoint_uri": published.uri,
        "digest": manifest.digest,
        "bytes": manifest.total_bytes,
    }
