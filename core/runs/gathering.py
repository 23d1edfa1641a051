"""A run's measurements, gathered from the publications of its steps."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from core.redaction import without_password
from core.runs.record import DistillationRecord, LayerSizes, PhaseRecord, RunRecord
from core.runs.run import Run
from core.settings.addresses import base_name
from core.storage.layout import GENERATED, PLAN, REPORT, STEPS, TEACHER
from core.storage.publication import find_publication
from core.storage.transfer import in_parallel
from core.tracking.mlflow import Tracker


def collect_record(
    run: Run, checkpoint_uri: str, phases: Iterable[int], *, tracker: Tracker | None = None
) -> RunRecord:
    """Gather what a run's steps have published so far.

    Args:
        run: The run.
        checkpoint_uri: Where the last of the checkpoints is, or will be.
        phases: Of which phases, 0 being the dense model.
        tracker: Says where it is tracked; None leaves that out.
    """
    steps = [(phase, step) for phase in phases for step in (STEPS if phase else ("evaluated",))]
    if run.settings.training.of_teacher is not None and (1, "recovered") in steps:
        steps.append((1, TEACHER))  # it is trained before the first phase trains
    if run.settings.prune.generates and (1, "pruned") in steps:
        steps.append((1, GENERATED))
    # At once: one after the other, twenty phases would take minutes from a distant store.
    files = dict(zip(steps, in_parallel(lambda at: _published_files(run, *at), steps), strict=True))
    reports = defaultdict[int, dict[str, dict[str, Any]]](dict)
    for (phase, step), (report, _) in files.items():
        reports[phase][step] = report
    return RunRecord(
        key=run.key,
        name=run.settings.name,
        base=base_name(run.settings.model.base),
        revision=run.revision,
        settings=run.settings.to_dict(),
        chosen=dict(run.chosen),
        phases=tuple(
            _phase_record(run, phase, found, files[phase, "scored"][1] if phase else {})
            for phase, found in reports.items()
        ),
        checkpoint_uri=checkpoint_uri,
        tracking_uri=without_password(tracker.uri) if tracker else "",  # a record is handed on
        tracking_run=tracker.parent_run_id if tracker else "",
    )


def _published_files(run: Run, phase: int, step: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the report and, of score-layers, the plan that a step has published; {} if it has not."""
    apart = {"evaluated": run.measured_uri(phase), TEACHER: run.uri(TEACHER)}
    apart[GENERATED] = run.uri(GENERATED)
    published = find_publication(apart.get(step) or run.phase_uri(phase, step))
    if published is None:
        return {}, {}
    return published.read_json(REPORT), published.read_json(PLAN) if step == "scored" else {}


def _phase_record(
    run: Run, phase: int, reports: Mapping[str, dict[str, Any]], plan: dict[str, Any]
) -> PhaseRecord:
    target_params = run.phase_params[phase - 1] if phase else run.dense.num_params()
    seconds = {step: report["seconds"] for step, report in reports.items() if report}
    decided, cut = reports.get("scored", {}), reports.get("pruned", {})
    trained, measured = reports.get("recovered", {}), reports["evaluated"]
    return PhaseRecord(
        phase=phase,
        params=plan.get("params_after", target_params),
        target_params=target_params,
        layers=_sizes_of(plan) if plan else tuple(LayerSizes(**asdict(layer)) for layer in run.dense.layers),
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
        mask_s=decided.get("mask_s", 0.0),
        mask_tokens=decided.get("mask_tokens", 0),
        repair_s=cut.get("repair_s", 0.0),
        distillation=DistillationRecord(
            seconds=cut["distill_s"],
            tokens=cut["distill_tokens"],
            before=cut["divergence_cut"],
            after=cut["divergence_distilled"],
        )
        if "distill_s" in cut
        else None,
        teacher_tokens=reports.get(TEACHER, {}).get("tokens", 0),
        tokens=trained.get("tokens", 0),
        losses=tuple((int(s), float(loss), float(rate)) for s, loss, rate in trained.get("losses", ())),
        held_out=tuple((int(s), float(x)) for s, x in trained.get("series", {}).get("held_out_loss", ())),
        seconds=seconds,
        accelerators={
            step: report["accelerators"] for step, report in reports.items() if "accelerators" in report
        },
    )


def _sizes_of(plan: Mapping[str, Any]) -> tuple[LayerSizes, ...]:
    """Return the sizes that a plan leaves of each layer of the dense model; 0 of those that went whole."""
    left = iter(layer for layer in plan["layers"] if layer["mlp_channels"])
    gone = {"query_heads": (), "kv_heads": (), "mlp_channels": ()}
    layers = [next(left) if share < 1 else gone for share in plan["sparsity"]]
    return tuple(
        LayerSizes(
            query_heads=len(layer["query_heads"]),
            kv_heads=len(layer["kv_heads"]),
            mlp_width=len(layer["mlp_channels"]),
        )
        for layer in layers
    )
