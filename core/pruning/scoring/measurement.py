"""Measuring a checkpoint on disk with the settings of a run: number format, memory, criterion."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from core.machine.memory import available_bytes
from core.model.build import pick_device
from core.model.checkpoint import Checkpoint
from core.model.layerwise import LayerwiseModel, exceeds_memory
from core.pruning.plan import LayerPlan
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.stages import Stages
from core.pruning.scoring.statistics import Statistics
from core.pruning.surgery import open_pruned, prune_model
from core.quantities import parse_bytes
from core.scratch import scratch_folder
from core.settings.calibration import CalibrationSettings
from core.settings.prune import PruneSettings

log = logging.getLogger(__name__)


def is_streamed(checkpoint: Checkpoint, calibration: CalibrationSettings, dtype: torch.dtype | None) -> bool:
    """Return whether layers are read from disk while they are used (``calibration.weights``)."""
    if calibration.weights != "auto":
        return calibration.weights == "streamed"
    streamed = exceeds_memory(checkpoint, dtype=dtype, device=pick_device())
    if streamed:
        log.info("the weights exceed half of the free memory: layers are read while they are used")
    return streamed


def state_memory(calibration: CalibrationSettings) -> int:
    """Return the host memory for activations in bytes."""
    if calibration.state_memory == "auto":
        return available_bytes() // 2
    return parse_bytes(calibration.state_memory)


def device_memory(free_bytes: int) -> int:
    """Return an accelerator's memory for ``measure(keep_bytes)``, given what the weights leave free."""
    return free_bytes // 4


class MeasuredCheckpoint:
    """A checkpoint that is opened once, and then measured and cut by turns, without being read again."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: CalibrationSettings,
        prune: PruneSettings,
        *,
        dtype: torch.dtype | None,
        seed: int,
        scratch: Path | None = None,
    ) -> None:
        """Open it: its weights are loaded, unless each layer is to be read from disk while it is used.

        Args:
            checkpoint: The checkpoint.
            calibration: ``weights``, ``state_memory`` and ``micro_batch`` are used.
            prune: ``similarity`` and ``criterion`` are used.
            dtype: Number format of weights and activations; None keeps the stored one.
            seed: Seed of the criterion ``random``.
            scratch: Holds a temporary folder for layers' inputs; None for the system's.

        Raises:
            CheckpointError: If the checkpoint cannot be loaded.
        """
        self._checkpoint, self._calibration, self._prune = checkpoint, calibration, prune
        self._dtype, self._seed, self._scratch = dtype, seed, scratch
        self._device = pick_device()
        self._streamed = is_streamed(checkpoint, calibration, dtype)
        self._kept: tuple[LayerPlan, ...] | None = None
        self._model = open_pruned(checkpoint, dtype=dtype, device=self._device, streamed=self._streamed)

    def cut(self, layers: tuple[LayerPlan, ...]) -> None:
        """Remove from what is left of the checkpoint all that ``layers`` do not keep."""
        if not self._streamed:
            self._model = LayerwiseModel(prune_model(self._model.model, layers))
            return
        if self._kept is not None:
            layers = tuple(a.then(b) for a, b in zip(self._kept, layers, strict=True))
        self._kept = layers
        self._model = open_pruned(
            self._checkpoint, self._kept, dtype=self._dtype, device=self._device, streamed=True
        )

    def measure(self, tokens: Tensor, stages: Stages | None = None) -> Statistics:
        """Measure layer similarities and group scores of what is left.

        Args:
            tokens: (S, T) int64 token ids of the calibration set.
            stages: See ``calibration.measure``.

        Raises:
            CheckpointError: If what is measured is not finite.
            StorageError: If the disk is full.
        """
        model, settings = self._model, self._calibration
        on_cpu = self._device.type == "cpu"
        if not on_cpu:
            torch.accelerator.empty_host_cache()  # pinned by the last measurement: PyTorch keeps it
        state_bytes = state_memory(settings)
        inputs_bytes = (
            tokens.numel() * model.model.config.hidden_size * len(model.layers) * model.model.dtype.itemsize
        )
        with scratch_folder(self._scratch) as states:
            return measure(
                model,
                tokens,
                micro_batch=settings.micro_batch,
                similarity=self._prune.similarity,
                criterion=self._prune.criterion,
                seed=self._seed,
                state_bytes=state_bytes,
                scratch=states,
                keep_bytes=state_bytes - inputs_bytes
                if on_cpu
                else device_memory(available_bytes(self._device)),
                stages=stages,
            )
