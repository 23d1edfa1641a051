"""What a run has measured, gathered from what its steps have published."""

from collections.abc import Iterable
from dataclasses import asdict

from core.redaction import without_password
from core.runs.record import LayerSizes, PhaseRecord, RunRecord
from core.runs.run import Run
from core.settings.addresses import base_name
from core.steps.frame import tracker_of
from core.storage.layout import PLAN, REPORT
from core.storage.publication import read_published


def collect_record(run: Run, checkpoint_uri: str, phases: Iterable[int]) -> RunRecord:
    """Gather what the steps of a run have published so far.

    Args:
        run: The run.
        checkpoint_uri: Where the last of the checkpoints is, or will be.
        phases: Of which phases, 0 being the dense model.
    """
    tracker = tracker_of(run)
    return RunRecord(
        key=run.key,
        name=run.settings.name,
        base=base_name(run.settings.model.base),
        revision=run.revision,
        settings=run.settings.to_dict(),
        chosen=dict(run.chosen),
        phases=tuple(_phase_record(run, phase) for phase in phases),
        checkpoint_uri=checkpoint_uri,
        tracking_uri=without_password(tracker.uri),  # a record is handed on
        tracking_run=tracker.parent_run_id,
    )


def _phase_record(run: Run, phase: int) -> PhaseRecord:
    target_params = run.phase_params[phase - 1] if phase else run.dense.num_params()
    steps = ("calibrated", "scored", "pruned", "recovered", "evaluated")
    uris = {step: run.phase_uri(phase, step) for step in steps} | {"evaluated": run.measured_uri(phase)}
    reports = {step: read_published(uri, REPORT) for step, uri in uris.items()}
    seconds = {step: report["seconds"] for step, report in reports.items() if report}
    trained, measured = reports["recovered"], reports["evaluated"]
    plan = read_published(run.phase_uri(phase, "scored"), PLAN) if phase else {}
    shapes = (
        [
            LayerSizes(
                query_heads=len(layer["query_heads"]),
                kv_heads=len(layer["kv_heads"]),
                mlp_width=len(layer["mlp_channels"]),
            )
            for layer in plan["layers"]
        ]
        if plan
        else [LayerSizes(**asdict(layer)) for layer in run.dense.layers]
    )
    return PhaseRecord(
        phase=phase,
        params=plan.get("params_after", target_params),
        target_params=target_params,
        layers=tuple(shapes),
        importance=tuple(plan.get("importance", ())),
        sparsity=tuple(plan.get("sparsity", ())),
        # Without training the phase's own evaluation is of the pruned model.
        perplexity_pruned=measured.get("perplexity_pruned")
        if trained
        else measured.get("perplexity")
        if phase
        else None,
        perplexity=measured.get("perplexity"),
        tasks=measured.get("tasks", {}),
        tokens=trained.get("tokens", 0),
        losses=tuple((int(s), float(loss), float(rate)) for s, loss, rate in trained.get("losses", ())),
        seconds=seconds,
    )
