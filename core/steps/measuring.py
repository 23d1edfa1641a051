"""A checkpoint of a run measured on a calibration draw: for calibrate, and between the steps of a phase."""

from pathlib import Path
from typing import TYPE_CHECKING

from core.runs.run import Run
from core.storage.layout import CALIBRATION_POOL
from core.storage.publication import Publication

if TYPE_CHECKING:
    from torch import Tensor

    from core.pruning.plan import LayerPlan
    from core.pruning.scoring.statistics import Statistics


def measure(
    run: Run,
    phase: int,
    checkpoint: Publication,
    data: Publication,
    scratch: Path,
    *,
    step: int = 0,
    layers: "tuple[LayerPlan, ...] | None" = None,
) -> "Statistics":
    """Measure a checkpoint, or what ``layers`` leave of it, for a pruning step of a phase."""
    from core.machine.precision import warn_if_emulated
    from core.model.build import dtype_of, pick_device
    from core.model.checkpoint import Checkpoint
    from core.pruning.scoring.measurement import measure_checkpoint

    settings = run.settings
    warn_if_emulated("calibration", settings.calibration.precision, pick_device())
    return measure_checkpoint(
        Checkpoint(checkpoint.fetch(scratch)),
        _draw(run, phase, step, data, scratch),
        settings.calibration,
        settings.prune,
        dtype=dtype_of(settings.calibration.precision),
        seed=settings.seed,
        layers=layers,
        scratch=scratch,
    )


def _draw(run: Run, phase: int, step: int, data: Publication, scratch: Path) -> "Tensor":
    """Return the calibration set of a pruning step of a phase, both counted over the run."""
    from safetensors.torch import load_file

    from core.pruning.scoring.calibration import draw_calibration

    folder = data.fetch(scratch, only=[CALIBRATION_POOL])
    pool = load_file(folder / CALIBRATION_POOL)["input_ids"]
    number = (phase - 1) * 1000 + step  # prune.steps_per_phase is at most 1000
    sequences = run.settings.calibration.sequences
    return draw_calibration(pool, sequences=sequences, seed=run.settings.seed, step=number)
