"""Measuring a checkpoint on disk with the settings of a run: number format, memory, criterion."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from core.machine.memory import available_bytes
from core.model.build import pick_device
from core.model.checkpoint import Checkpoint
from core.model.layerwise import exceeds_memory
from core.pruning.plan import LayerPlan
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.statistics import Statistics
from core.pruning.surgery import open_pruned
from core.quantities import parse_bytes
from core.scratch import scratch_folder
from core.settings.calibration import CalibrationSettings
from core.settings.prune import PruneSettings

log = logging.getLogger(__name__)


def measure_checkpoint(
    checkpoint: Checkpoint,
    tokens: Tensor,
    calibration: CalibrationSettings,
    prune: PruneSettings,
    *,
    dtype: torch.dtype | None,
    seed: int,
    layers: tuple[LayerPlan, ...] | None = None,
    scratch: Path | None = None,
) -> Statistics:
    """Measure layer similarities and group scores of a checkpoint, or of what a plan leaves of it.

    Args:
        checkpoint: The checkpoint.
        tokens: (S, T) int64 token ids of the calibration set.
        calibration: ``weights``, ``state_memory`` and ``micro_batch`` are used.
        prune: ``similarity`` and ``criterion`` are used.
        dtype: Number format of weights and activations; None keeps the stored one.
        seed: Seed of the criterion ``random``.
        layers: What each layer keeps; None for all.
        scratch: Holds a temporary folder for layers' inputs; None for the system's.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded, or what is measured is not finite.
        StorageError: If the disk is full.
    """
    device = pick_device()
    streamed = calibration.weights == "streamed"
    if calibration.weights == "auto" and exceeds_memory(checkpoint, dtype=dtype, device=device):
        log.info("the weights would take over half of the free memory: layers are read while they are used")
        streamed = True
    model = open_pruned(checkpoint, layers, dtype=dtype, device=device, streamed=streamed)
    auto = calibration.state_memory == "auto"
    state_bytes = available_bytes() // 2 if auto else parse_bytes(calibration.state_memory)
    inputs_bytes = (
        tokens.numel() * model.model.config.hidden_size * len(model.layers) * model.model.dtype.itemsize
    )
    with scratch_folder(scratch) as states:
        return measure(
            model,
            tokens,
            micro_batch=calibration.micro_batch,
            similarity=prune.similarity,
            criterion=prune.criterion,
            seed=seed,
            state_bytes=state_bytes,
            scratch=states,
            # On an accelerator, computing outputs again is faster than fetching them from the host.
            keep_bytes=state_bytes - inputs_bytes if device.type == "cpu" else available_bytes(device) // 4,
        )
