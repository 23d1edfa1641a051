"""Copies between the device that runs the layers and host memory; none on the CPU.

On a GPU, copies from and to pinned memory run on a stream of their own, beside the computation. Both
directions share that stream, so copies are done in the order of the calls: a host buffer may be overwritten
once its upload has been started, and read back once its download has. This has not been run on a GPU: the
tests simulate the streams.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Arrival = Callable[[], Tensor]
"""Makes the device wait for a copy, and returns the copy."""

_IN_FLIGHT = 4
"""Most copies under way: were the host to run further ahead, their buffers would fill the device's memory."""


class Copies:
    """For the CPU: the host's memory is the device's."""

    crosses = False
    """Whether copies cross a bus."""

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a host buffer that is not filled."""
        return torch.empty(shape, dtype=dtype)

    def to_host(self, source: Tensor, into: Tensor) -> None:
        """Fill a host buffer; only ``to_device`` may read it."""
        into.copy_(source)

    def to_device(self, source: Tensor) -> Arrival:
        """Bring a host tensor to the device."""
        return lambda: source


class CudaCopies(Copies):
    """For a GPU."""

    crosses = True

    def __init__(self, device: torch.device) -> None:
        """Create the stream."""
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._in_flight: deque[torch.cuda.Event] = deque()

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return pinned memory, which alone can be copied beside the computation."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_host(self, source: Tensor, into: Tensor) -> None:
        """Start a copy; ``source`` may be dropped at once, but not changed."""
        with self._copying(source):
            into.copy_(source, non_blocking=True)

    def to_device(self, source: Tensor) -> Arrival:
        """Start a copy into new memory."""
        arrived = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        with self._copying(arrived):
            arrived.copy_(source, non_blocking=True)
        event = self._in_flight[-1]

        def wait() -> Tensor:
            torch.cuda.current_stream(self._device).wait_event(event)
            return arrived

        return wait

    @contextlib.contextmanager
    def _copying(self, on_device: Tensor) -> Iterator[None]:
        # What is copied must have been computed, and new memory may still be in use by earlier computation.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        on_device.record_stream(self._stream)  # its memory is not used again before the copy is done
        self._in_flight.append(self._stream.record_event())
        if len(self._in_flight) > _IN_FLIGHT:
            self._in_flight.popleft().synchronize()


def copies_for(device: torch.device) -> Copies:
    """Return the way to copy between a device and the host."""
    return CudaCopies(device) if device.type == "cuda" else Copies()


def ahead(arrivals: Iterator[Arrival]) -> Iterator[Tensor]:
    """Yield copies on the device one by one, each while the next one is on its way."""
    coming = next(arrivals)
    for following in arrivals:
        yield coming()
        coming = following
    yield coming()
