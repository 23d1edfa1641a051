"""AdamW for recovery training, whose moments may stay in host memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from core.settings.training import TrainingSettings

_PART_BYTES = 2**30
_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(parameters: Iterable[Tensor], settings: "TrainingSettings") -> Optimizer:
    """Return the optimizer of some parameters, before its first step."""
    kind = HostAdamW if settings.moments == "host" else torch.optim.AdamW
    return kind(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def device_of_moments(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """Return where the moments of a parameter are between two steps."""
    return torch.device("cpu") if isinstance(optimizer, HostAdamW) else parameter.device


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments are in host memory between steps: some at a time pass through the device.

    It computes what AdamW computes, bit for bit. A step takes the time to move 8 bytes a parameter there and
    back.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters, part by part."""
        assert closure is None
        (group,) = self.param_groups
        parameters = group["params"]
        try:
            for part in _parts(parameters):
                for parameter in part:
                    self._move(parameter, parameter.device)
                group["params"] = part
                super().step()
                for parameter in part:
                    self._move(parameter, torch.device("cpu"))
        finally:
            group["params"] = parameters

    def _move(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state[parameter]
        for name in _MOMENTS:
            if name in state:
                moment = state[name]
                moved = torch.empty_like(moment, device=device, pin_memory=moment.device.type == "cuda")
                state[name] = moved.copy_(moment)


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters so that the moments of a group take limited memory."""
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if part and size + 2 * parameter.nbytes > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += 2 * parameter.nbytes
    yield part
