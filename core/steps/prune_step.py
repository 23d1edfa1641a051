"""The step that removes groups: prune-step."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import PlanError
from core.runs.run import Run
from core.steps.distilling import distill_cut
from core.steps.frame import Artifact, Workspace, compute_once, describe_checkpoint, provenance_of
from core.steps.measuring import REPAIR_DRAW, opened_for_repair
from core.storage.interface import join_uri
from core.storage.layout import PLAN, RESUME
from core.storage.publication import Publication, find_publication, open_publication
from core.tracking.mlflow import ChildRun
from core.training.resume import remove_states

if TYPE_CHECKING:
    from core.model.checkpoint import Checkpoint
    from core.pruning.repair import Repair


def run_prune_step(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, model: Artifact
) -> str:
    """Remove the groups that the plan, which score-layers has published, leaves out. Repair what stays.

    What is cut is the model that the method has made, where score-layers has published one beside the plan.
    All steps of the phase are cut at once, so that the repair aims at what the checkpoint computes. Both are
    done a layer at a time. What a distillation aims at is the dense base model, in every phase.

    Returns:
        URI of the smaller checkpoint.
    """
    this = Run.load(run)
    uri = this.phase_uri(phase, "pruned")

    def compute(work: Workspace) -> dict[str, Any]:
        import torch

        from core.model.build import model_shape
        from core.model.checkpoint import INDEX, Checkpoint
        from core.pruning.plan import Plan
        from core.pruning.surgery import prune_checkpoint
        from core.steps.footprint import explaining_memory
        from core.steps.formats import written_format

        scored = open_publication(this.phase_uri(phase, "scored"))
        folder = scored.fetch(work.scratch / "scored")
        plan = Plan.load(folder / PLAN)
        source = open_publication(checkpoint_uri)
        digest, checkpoint = source.digest, Checkpoint(source.fetch(work.scratch))
        dtype, final = written_format(this, phase, checkpoint, trained=False)
        provenance = provenance_of(this, phase, digest, step="prune-step") | final
        whole = Checkpoint(folder) if (folder / INDEX).is_file() else checkpoint
        distills, started = this.settings.prune.distill_steps > 0, time.monotonic()
        target = work.scratch / "cut" if distills else work.out
        written = torch.float32 if distills else dtype  # rounded once, when all is done
        with explaining_memory("calibration.micro_batch=1, or calibration.weights=streamed"):
            repair = _repair(this, phase, whole, data_uri, work.scratch)
            prune_checkpoint(
                whole,
                target,
                plan,
                digest=digest,
                dtype=written,
                provenance=provenance,
                repair=None if repair is None else repair.layer,
                biased=repair is not None and repair.kind == "bias",
            )
        left = model_shape(Checkpoint(target).config).num_params()
        if left != plan.params_after:
            raise PlanError(
                f"the plan of phase {phase} leaves {plan.params_after:,} parameters, the cut {left:,}: the "
                "model that it was made for is not beside it. Remove "
                f"{this.phase_uri(phase, 'scored')}, and run the recipe again."
            )
        report: dict[str, Any] = {"params": left}
        if repair is not None:
            report["repair_s"] = time.monotonic() - started
        if distills:
            del repair  # with its model
            dense, data = checkpoint, open_publication(data_uri)
            if checkpoint_uri != this.base_uri:
                dense = Checkpoint(open_publication(this.base_uri).fetch(work.scratch / "base"))
            report |= distill_cut(
                this,
                phase,
                Checkpoint(work.scratch / "cut"),
                dense,
                number=REPAIR_DRAW,
                data=data,
                scratch=work.scratch,
                target=work.out,
                states_uri=join_uri(uri, RESUME),
                belongs_to=this.inputs(digest, data.digest) | {"plan": scored.digest},
                dtype=dtype,
                provenance=provenance,
            )
        return report

    def track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
        child.log_series("divergence", list(enumerate(report.get("divergences", ()), start=1)))

    if this.settings.prune.generates and find_publication(uri) is None:
        from core.steps.self_text import write_own_text

        write_own_text(this)
    published = compute_once(this, uri, phase=phase, step="prune-step", compute=compute, track=track)
    remove_states(join_uri(uri, RESUME))
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
    data = open_publication(data_uri)
    model, tokens = opened_for_repair(run, phase, checkpoint, data, scratch, what="the repair")
    device = model.model.device
    states_bytes = tokens.numel() * model.model.config.hidden_size * model.model.dtype.itemsize
    room = state_memory(calibration) - states_bytes if device.type == "cpu" else available_bytes(device) // 4
    return Repair(
        model,
        tokens,
        kind=prune.repair,
        ridge=prune.ridge,
        micro_batch=calibration.micro_batch,
        keep_bytes=room,
    )
