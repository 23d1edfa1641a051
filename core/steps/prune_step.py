"""The step that removes groups: prune-step."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.quantities import parse_count
from core.runs.run import Run
from core.steps.distilling import distill_cut
from core.steps.frame import Artifact, Workspace, compute_once, describe_checkpoint, provenance_of
from core.steps.measuring import draw
from core.storage.layout import PLAN
from core.storage.publication import Publication, open_publication
from core.tracking.mlflow import ChildRun

if TYPE_CHECKING:
    from torch import Tensor

    from core.model.checkpoint import Checkpoint
    from core.model.layerwise import LayerwiseModel
    from core.pruning.repair import Repair

log = logging.getLogger(__name__)

_DRAW = 999
"""Number of the calibration draw within the phase, after those of its steps."""


def run_prune_step(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, model: Artifact
) -> str:
    """Remove the groups that the plan, which score-layers has published, leaves out. Repair what stays.

    Under ``slicegpt`` the plan keeps all groups, and the signal between the layers is sliced instead.
    All steps of the phase are cut at once, so that the repair aims at what the checkpoint computes. Both are
    done a layer at a time. What a distillation aims at is the dense base model, in every phase.

    Returns:
        URI of the smaller checkpoint.
    """
    this = Run.load(run)

    def compute(work: Workspace) -> dict[str, Any]:
        import torch

        from core.model.checkpoint import Checkpoint
        from core.pruning.methods.slicegpt import slice_checkpoint
        from core.pruning.plan import Plan
        from core.pruning.surgery import prune_checkpoint
        from core.steps.footprint import explaining_memory
        from core.steps.formats import written_format

        scored = open_publication(this.phase_uri(phase, "scored"))
        plan = Plan.load(scored.fetch(work.scratch / "scored", only=[PLAN]) / PLAN)
        source = open_publication(checkpoint_uri)
        digest, checkpoint = source.digest, Checkpoint(source.fetch(work.scratch))
        dtype, final = written_format(this, phase, checkpoint, trained=False)
        provenance = provenance_of(this, phase, digest, step="prune-step") | final
        distills, started = this.settings.prune.distill_steps > 0, time.monotonic()
        target = work.scratch / "cut" if distills else work.out
        written = torch.float32 if distills else dtype  # rounded once, when all is done
        repair: Repair | None = None
        with explaining_memory("calibration.micro_batch=1, or calibration.weights=streamed"):
            if this.settings.prune.method == "slicegpt":
                model, tokens = _opened(this, phase, checkpoint, data_uri, work.scratch)
                slice_checkpoint(
                    checkpoint,
                    target,
                    model,
                    tokens,
                    target_params=plan.target_params,
                    micro_batch=this.settings.calibration.micro_batch,
                    dtype=written,
                    provenance=provenance,
                )
                del model
            else:
                repair = _repair(this, phase, checkpoint, data_uri, work.scratch)
                prune_checkpoint(
                    checkpoint,
                    target,
                    plan,
                    digest=digest,
                    dtype=written,
                    provenance=provenance,
                    repair=None if repair is None else repair.layer,
                    biased=repair is not None and repair.kind == "bias",
                )
        report: dict[str, Any] = {"params": plan.params_after}
        if repair is not None:
            report["repair_s"] = time.monotonic() - started
        if distills:
            del repair  # with its model
            dense = checkpoint
            if checkpoint_uri != this.base_uri:
                dense = Checkpoint(open_publication(this.base_uri).fetch(work.scratch / "base"))
            report |= distill_cut(
                this,
                phase,
                Checkpoint(work.scratch / "cut"),
                dense,
                number=_DRAW,
                data=open_publication(data_uri),
                scratch=work.scratch,
                target=work.out,
                dtype=dtype,
                provenance=provenance,
            )
        return report

    def track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
        child.log_series("divergence", list(enumerate(report.get("divergences", ()), start=1)))

    uri = this.phase_uri(phase, "pruned")
    published = compute_once(this, uri, phase=phase, step="prune-step", compute=compute, track=track)
    describe_checkpoint(published, model)
    return uri


def _repair(run: Run, phase: int, checkpoint: "Checkpoint", data_uri: str, scratch: Path) -> "Repair | None":
    """Return what repairs the layers of a checkpoint, if the settings ask for it."""
    from core.machine.memory import available_bytes
    from core.pruning.repair import Repair
    from core.pruning.scoring.measurement import state_memory

    prune, calibration = run.settings.prune.applied(), run.settings.calibration
    if prune.repair == "none":
        return None
    model, tokens = _opened(run, phase, checkpoint, data_uri, scratch)
    device = model.model.device
    states_bytes = tokens.numel() * model.model.config.hidden_size * model.model.dtype.itemsize
    room = state_memory(calibration) - states_bytes if device.type == "cpu" else available_bytes(device) // 4
    return Repair(
        model,
        tokens,
        kind=prune.repair,
        ridge=prune.repair_ridge,
        micro_batch=calibration.micro_batch,
        keep_bytes=room,
    )


def _opened(
    run: Run, phase: int, checkpoint: "Checkpoint", data_uri: str, scratch: Path
) -> "tuple[LayerwiseModel, Tensor]":
    """Return a checkpoint, opened, and the calibration tokens that a repair or a slice is computed from."""
    from core.model.build import dtype_of, pick_device
    from core.pruning.scoring.measurement import is_streamed
    from core.pruning.surgery import open_pruned
    from core.steps.prune_footprint import check_repair

    prune, calibration = run.settings.prune.applied(), run.settings.calibration
    sequences = -(-parse_count(prune.repair_tokens) // calibration.sequence_length)
    tokens = draw(run, phase, _DRAW, open_publication(data_uri), scratch, sequences=sequences, or_all=True)
    dtype, device = dtype_of(calibration.precision), pick_device()
    check_repair(checkpoint.config, calibration, prune, device.type)
    streamed = is_streamed(checkpoint, calibration, dtype)
    model = open_pruned(checkpoint, dtype=dtype, device=device, streamed=streamed)
    log.info("%s on %s tokens", "slicing" if prune.repair == "none" else "repairing", f"{tokens.numel():,}")
    return model, tokens
