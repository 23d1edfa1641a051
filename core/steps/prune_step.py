"""The step that removes groups: prune-step."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.runs.run import Run
from core.steps.frame import (
    Artifact,
    Workspace,
    compute_once,
    describe_checkpoint,
    digest_of,
    provenance_of,
)
from core.storage.layout import PLAN
from core.storage.publication import fetch

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


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

        scored = this.phase_uri(phase, "scored")
        plan = Plan.load(fetch(scored, work.scratch / "scored", only=[PLAN]) / PLAN)
        digest = digest_of(checkpoint_uri)
        prune_checkpoint(
            Checkpoint(fetch(checkpoint_uri, work.scratch)),
            work.out,
            plan,
            digest=digest,
            dtype=dtype_of(this.settings.model.dtype),
            provenance=provenance_of(this, phase, digest, step="prune-step"),
        )
        return {"params": plan.params_after}

    uri = this.phase_uri(phase, "pruned")
    compute_once(this, uri, phase=phase, step="prune-step", compute=compute)
    describe_checkpoint(uri, model)
    return uri
