"""The inputs of every layer on a calibration set: on the device, in host memory, on disk.

The last layers' inputs lie nearest, because the backward pass needs them first: it starts without waiting for
a copy, and whatever lies further away is written early in the forward pass and read late in the backward one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import StorageError
from core.pruning.scoring.copies import Arrival, Copies


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where the states of a measurement lie.

    Attributes:
        stays: Whether the hidden states between two layers, and later their gradients, stay on the device.
        on_device: Layers whose inputs lie there: the last ones.
        in_host: Layers before these whose inputs lie in host memory, which on the CPU is all there is.
        left_bytes: Memory left on the device for outputs that would otherwise be computed again.
    """

    stays: bool
    on_device: int
    in_host: int
    left_bytes: int


def share_out(
    layers: int, layer_bytes: int, *, crosses: bool, device_bytes: int, host_bytes: int | None
) -> Room:
    """Share out memory between hidden states, the layers' inputs and outputs of projections.

    Args:
        layers: Layers whose inputs are kept.
        layer_bytes: Size of one layer's inputs.
        crosses: Whether the device has memory of its own.
        device_bytes: Memory there; on the CPU, memory for outputs alone.
        host_bytes: Host memory for inputs; None for no limit.
    """
    fit = min(max(0, device_bytes) // layer_bytes, layers + 1) if crosses else 0
    on_device = max(0, fit - 1)
    in_host = layers - on_device
    if host_bytes is not None:
        in_host = min(in_host, host_bytes // held_bytes(layer_bytes, crosses=crosses))
    return Room(
        stays=fit > 0 or not crosses,
        on_device=on_device,
        in_host=in_host,
        left_bytes=max(0, device_bytes - fit * layer_bytes),
    )


def held_bytes(layer_bytes: int, *, crosses: bool) -> int:
    """Return the host memory that one layer's inputs take: PyTorch pins powers of 2."""
    return 1 << (layer_bytes - 1).bit_length() if crosses else layer_bytes


class LayerInputs:
    """Keeps the input of each layer, one micro-batch at a time; inputs on disk can be taken once."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        room: Room,
        device: torch.device,
        copies: Copies,
        scratch: Path | None = None,
    ) -> None:
        """Allocate the memory in large pieces: many small ones would fragment it.

        Args:
            layers: L.
            shape: (S, T, D) of all micro-batches together.
            dtype: Number format of the inputs.
            room: Where each layer's inputs lie.
            device: Where the layers run.
            copies: Between the device and the host.
            scratch: Folder for inputs that fit nowhere else.
        """
        self._first_on_device = layers - room.on_device
        self._first_held = self._first_on_device - room.in_host
        held: Sequence[Tensor]
        if copies.crosses:  # see held_bytes
            held = [copies.host_empty(shape, dtype) for _ in range(room.in_host)]
        else:
            held = copies.host_empty((room.in_host, *shape), dtype).unbind()
        on_device = torch.empty((room.on_device, *shape), dtype=dtype, device=device)
        self._memory = [*held, *on_device.unbind()]
        self._copies, self._scratch = copies, scratch

    def put(self, layer: int, rows: slice, state: Tensor) -> None:
        """Keep the (B, T, D) input of a layer for some of the sequences.

        Raises:
            StorageError: If the disk is full.
        """
        if layer >= self._first_on_device:
            self._memory[layer - self._first_held][rows] = state
            return
        if layer >= self._first_held:
            self._copies.to_host(state, self._memory[layer - self._first_held][rows])
            return
        path = self._path(layer, rows)
        try:
            save_file({"state": state.cpu().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{path} cannot be written ({error}). Free space there, lower calibration.sequences, or "
                "raise calibration.state_memory."
            ) from error

    def take(self, layer: int, rows: slice) -> Arrival:
        """Start bringing the input that was put to the device."""
        if layer >= self._first_held:
            state = self._memory[layer - self._first_held][rows]
            return self._copies.to_device(state) if layer < self._first_on_device else lambda: state
        path = self._path(layer, rows)
        state = load_file(path)["state"]
        path.unlink()
        return self._copies.to_device(state)

    def _path(self, layer: int, rows: slice) -> Path:
        assert self._scratch is not None, "a limit needs a scratch folder"
        return self._scratch / f"layer-{layer:03d}-{rows.start:06d}.safetensors"
