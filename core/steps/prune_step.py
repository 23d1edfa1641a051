"""The step that removes groups: prune-step."""

from collections.abc import Mapping
from typing import Any

from core.runs.run import Run
from core.steps.frame import Artifact, Workspace, compute_once, describe_checkpoint, provenance_of
from core.storage.layout import PLAN
from core.storage.publication import open_publication


def run_prune_step(*, run: Mapping[str, Any], phase: int, checkpoint_uri: str, model: Artifact) -> str:
    """Remove the groups that the plan, which score-layers has published, leaves out, a layer at a time.

    Returns:
        URI of the smaller checkpoint.
    """
    this = Run.load(run)

    def compute(work: Workspace) -> dict[str, Any]:
        from core.model.build import dtype_of
        from core.model.checkpoint import Checkpoint
        from core.pruning.plan import Plan
        from core.pruning.surgery import prune_checkpoint

        scored = open_publication(this.phase_uri(phase, "scored"))
        plan = Plan.load(scored.fetch(work.scratch / "scored", only=[PLAN]) / PLAN)
        checkpoint = open_publication(checkpoint_uri)
        digest = checkpoint.digest
        prune_checkpoint(
            Checkpoint(checkpoint.fetch(work.scratch)),
            work.out,
            plan,
            digest=digest,
            dtype=dtype_of(this.settings.model.dtype),
            provenance=provenance_of(this, phase, digest, step="prune-step"),
        )
        return {"params": plan.params_after}

    uri = this.phase_uri(phase, "pruned")
    published = compute_once(this, uri, phase=phase, step="prune-step", compute=compute)
    describe_checkpoint(published, model)
    return uri
