"""The number formats of the checkpoints that a run writes."""

from typing import Any

import torch

from core.model.build import dtype_of
from core.model.checkpoint import Checkpoint
from core.runs.run import Run

_FINAL = "final_dtype"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def written_format(
    run: Run, phase: int, checkpoint: Checkpoint, *, trained: bool
) -> tuple[torch.dtype, dict[str, Any]]:
    """Return the number format in which a step writes what it makes of a checkpoint.

    The run's last checkpoint has the format that ``model.dtype`` asks for. Those before it keep what rounding
    to that would lose, unless ``model.dtype_between_phases`` says otherwise.

    Args:
        run: The run.
        phase: The step's phase.
        checkpoint: The one that the step reads.
        trained: Whether the step trains; else it removes groups.

    Returns:
        The format, and an entry for the checkpoint's provenance by which the next step knows the last one's.
    """
    known = checkpoint.provenance if checkpoint.provenance.get("run") == run.key else {}
    final = dtype_of(run.settings.model.dtype) or _DTYPES.get(str(known.get(_FINAL))) or checkpoint.dtype
    settings = run.settings
    is_last = phase == settings.prune.phases and (trained or not settings.training.total_steps)
    wide = settings.model.dtype_between_phases == "float32" and not is_last
    name = str(final).removeprefix("torch.")
    return torch.promote_types(final, torch.float32) if wide else final, {_FINAL: name}
