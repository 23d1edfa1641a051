"""The inputs of every layer on a calibration set: in host memory up to a limit, on disk beyond it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import StorageError


class LayerInputs:
    """Keeps the input of each layer, one micro-batch at a time; inputs on disk can be taken once."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        limit_bytes: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Allocate the memory in one piece: many small ones would fragment it.

        Args:
            layers: L.
            shape: (S, T, D) of all micro-batches together.
            dtype: Number format of the inputs.
            limit_bytes: Limit of host memory; None for no limit.
            scratch: Folder for the rest; needed with a limit.
        """
        a_layer = shape[0] * shape[1] * shape[2] * dtype.itemsize
        held = layers if limit_bytes is None else min(layers, limit_bytes // a_layer)
        self._held = torch.empty((held, *shape), dtype=dtype)
        self._scratch = scratch

    def put(self, layer: int, rows: slice, state: Tensor) -> None:
        """Keep the (B, T, D) input of a layer for some of the sequences.

        Raises:
            StorageError: If the disk is full.
        """
        if layer < len(self._held):
            self._held[layer, rows] = state
            return
        path = self._path(layer, rows)
        try:
            save_file({"state": state.cpu().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{path} cannot be written ({error}). Free space there, lower calibration.sequences, or "
                "raise calibration.state_memory."
            ) from error

    def take(self, layer: int, rows: slice) -> Tensor:
        """Return the input that was put."""
        if layer < len(self._held):
            return self._held[layer, rows]
        path = self._path(layer, rows)
        state = load_file(path)["state"]
        path.unlink()
        return state

    def _path(self, layer: int, rows: slice) -> Path:
        assert self._scratch is not None, "a limit needs a scratch folder"
        return self._scratch / f"layer-{layer:03d}-{rows.start:06d}.safetensors"
