"""A phase's checkpoint measured on calibration draws: by calibrate, and between the steps of a phase."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.quantities import parse_count
from core.runs.run import Run
from core.steps.stages import SavedStages
from core.storage.layout import CALIBRATION_POOL
from core.storage.publication import Publication

if TYPE_CHECKING:
    from torch import Tensor

    from core.model.checkpoint import Checkpoint
    from core.model.layerwise import LayerwiseModel
    from core.pruning.plan import LayerPlan
    from core.pruning.scoring.measurement import MeasuredCheckpoint
    from core.pruning.scoring.statistics import Statistics

log = logging.getLogger(__name__)

REPAIR_DRAW = 999
"""Number of the repair's draw within a phase, after those of its steps."""


def draw(
    run: Run,
    phase: int,
    step: int,
    data: Publication,
    scratch: Path,
    *,
    sequences: int,
    or_all: bool = False,
) -> "Tensor":
    """Return (S, T) token ids drawn for a pruning step of a phase.

    Raises:
        DataError: If the pool holds fewer documents, unless all of them serve, too (``or_all``).
    """
    from safetensors.torch import load_file

    from core.pruning.scoring.calibration import draw_calibration

    folder = data.fetch(scratch, only=[CALIBRATION_POOL])
    pool = load_file(folder / CALIBRATION_POOL)["input_ids"]
    number = (phase - 1) * 1000 + step  # prune.steps_per_phase is at most 1000
    wanted = min(sequences, len(pool)) if or_all else sequences
    return draw_calibration(pool, sequences=wanted, seed=run.settings.seed, step=number)


def opened_for_repair(
    run: Run, phase: int, checkpoint: "Checkpoint", data: Publication, scratch: Path, *, what: str
) -> "tuple[LayerwiseModel, Tensor]":
    """Return a checkpoint, opened, and the calibration tokens that a repair or a slice is computed from.

    Raises:
        OutOfMemoryError: If ``what`` is computed would not fit into the memory.
    """
    import torch

    from core.model.build import dtype_of, pick_device
    from core.pruning.scoring.measurement import is_streamed
    from core.pruning.surgery import open_pruned
    from core.steps.prune_footprint import check_repair
    from core.steps.self_text import own_text

    prune, calibration = run.settings.prune.applied(), run.settings.calibration
    sequences = -(-parse_count(prune.repair_tokens) // calibration.sequence_length)
    tokens = draw(run, phase, REPAIR_DRAW, data, scratch, sequences=sequences, or_all=True)
    tokens = torch.cat([tokens, own_text(run, scratch)])
    dtype, device = dtype_of(calibration.precision), pick_device()
    check_repair(checkpoint.config, calibration, prune, device.type, what=what)
    streamed = is_streamed(checkpoint, calibration, dtype)
    model = open_pruned(checkpoint, dtype=dtype, device=device, streamed=streamed)
    log.info("%s takes %s tokens", what, f"{tokens.numel():,}")
    return model, tokens


class PhaseMeasurement:
    """The checkpoint of a phase, opened once for all its pruning steps."""

    def __init__(
        self, run: Run, phase: int, checkpoint: Publication, data: Publication, scratch: Path
    ) -> None:
        """Name it; it is fetched and opened when it is measured. ``scratch`` holds what is fetched."""
        self._run, self._phase, self._data, self._scratch = run, phase, data, scratch
        self._checkpoint = checkpoint
        self._measured: MeasuredCheckpoint | None = None
        self._cuts: list[tuple[LayerPlan, ...]] = []

    def cut(self, layers: "tuple[LayerPlan, ...]") -> None:
        """Remove from what is left of the checkpoint all that ``layers`` do not keep."""
        self._cuts.append(layers)

    def stages(self, uri: str, **made_of: Any) -> SavedStages:
        """Return what has been kept, at a place in the store, of a measurement of this checkpoint.

        Args:
            uri: Holds nothing else.
            made_of: What tells the measurement from others of this checkpoint.
        """
        return SavedStages(
            uri,
            self._scratch / "stages",
            made_of=self._run.inputs(self._checkpoint.digest, self._data.digest) | made_of,
        )

    def measure(self, step: int, stages: SavedStages) -> "Statistics":
        """Measure what is left.

        Args:
            step: Of the phase, counted from 0: the measurement is on its draw.
            stages: What is kept of this measurement.

        Raises:
            OutOfMemoryError: If the measurement would not fit into the memory.
        """
        from core.steps.footprint import explaining_memory

        sequences = self._run.settings.calibration.sequences
        tokens = draw(self._run, self._phase, step, self._data, self._scratch, sequences=sequences)
        with explaining_memory("calibration.micro_batch=1, or calibration.weights=streamed"):
            if self._measured is None:
                self._measured = self._opened()
            while self._cuts:
                self._measured.cut(self._cuts.pop(0))
            return self._measured.measure(tokens, stages)

    def _opened(self) -> "MeasuredCheckpoint":
        from core.machine.precision import warn_if_emulated
        from core.model.build import dtype_of, pick_device
        from core.model.checkpoint import Checkpoint
        from core.pruning.scoring.measurement import MeasuredCheckpoint
        from core.steps.footprint import check_scoring

        settings, prune = self._run.settings, self._run.settings.prune.applied()
        opened = Checkpoint(self._checkpoint.fetch(self._scratch))
        warn_if_emulated("calibration", settings.calibration.precision, pick_device())
        check_scoring(opened.config, settings.calibration, prune, pick_device().type)
        return MeasuredCheckpoint(
            opened,
            settings.calibration,
            prune,
            dtype=dtype_of(settings.calibration.precision),
            seed=settings.seed,
            scratch=self._scratch,
        )
