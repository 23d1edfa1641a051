"""The inputs of every layer on a calibration set: in host memory up to a limit, beyond it on disk."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import StorageError


class LayerInputs:
    """Keeps tensors by layer and micro-batch; each is taken out once."""

    def __init__(self, *, limit_bytes: int | None = None, scratch: Path | None = None) -> None:
        """Start empty.

        Args:
            limit_bytes: Host memory at most; None for no limit.
            scratch: Folder for what goes beyond; needed with a limit.
        """
        self._limit, self._scratch = limit_bytes, scratch
        self._held: dict[tuple[int, int], Tensor] = {}
        self._held_bytes = 0

    def put(self, layer: int, batch: int, state: Tensor) -> None:
        """Keep the input of a layer.

        Raises:
            StorageError: If the disk is full.
        """
        size = state.nbytes
        if self._limit is None or self._held_bytes + size <= self._limit:
            self._held[layer, batch] = state.cpu()
            self._held_bytes += size
            return
        path = self._path(layer, batch)
        try:
            save_file({"state": state.cpu().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{path} cannot be written ({error}). Free space there, lower calibration.sequences, or "
                "raise calibration.state_memory."
            ) from error

    def take(self, layer: int, batch: int) -> Tensor:
        """Return the input of a layer and forget it."""
        if (layer, batch) in self._held:
            state = self._held.pop((layer, batch))
            self._held_bytes -= state.nbytes
            return state
        path = self._path(layer, batch)
        state = load_file(path)["state"]
        path.unlink()
        return state

    def _path(self, layer: int, batch: int) -> Path:
        assert self._scratch is not None, "a limit needs a scratch folder"
        return self._scratch / f"layer-{layer:03d}-{batch:05d}.safetensors"
