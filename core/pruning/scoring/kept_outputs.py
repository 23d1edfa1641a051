"""Outputs of linear maps kept from the forward pass, so that the backward pass need not compute them again.

Back-propagating through a linear map takes its input, not its output. So a layer that runs again for its
backward pass may take its projections' outputs from the first run, as far as memory allows, and does not need
an output that only goes into the residual sum.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.model.families import Family
from core.model.layerwise import replaced


class KeptOutputs:
    """Keeps outputs of linear maps from a layer's first run for its second one."""

    def __init__(
        self,
        family: Family,
        layers: Sequence[nn.Module],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
    ) -> None:
        """Choose the outputs that save most arithmetic per byte, and allocate the memory in one piece.

        Args:
            family: Defines the last projection, and whether its output is needed.
            layers: The decoder layers; only their sizes are used.
            shape: (S, T) of all micro-batches together.
            dtype: Number format of the outputs.
            device: Where they are kept.
            budget_bytes: Memory for the outputs.
        """
        self._needless = _needless(family)
        tokens = shape[0] * shape[1]
        chosen = choose_outputs(family, layers, tokens * dtype.itemsize, budget_bytes)
        memory = torch.empty(sum(width for *_, width in chosen) * tokens, dtype=dtype, device=device)
        self._kept: list[dict[str, Tensor]] = [{} for _ in layers]
        pieces = memory.split([width * tokens for *_, width in chosen])
        for (index, name, width), piece in zip(chosen, pieces, strict=True):
            self._kept[index][name] = piece.view(*shape, width)

    def keeps(self, index: int) -> bool:
        """Return whether an output of layer ``index`` is kept."""
        return bool(self._kept[index])

    @contextlib.contextmanager
    def keep(self, index: int, rows: slice, layer: nn.Module) -> Iterator[None]:
        """Keep the chosen outputs of layer ``index`` while it runs on some of the sequences."""
        hooks = [
            layer.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, kept=kept: kept[rows].copy_(output)
            )
            for name, kept in self._kept[index].items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def reuse(self, index: int, rows: slice, layer: nn.Module) -> Iterator[None]:
        """Let layer ``index`` use its kept outputs; the layer's own output is meaningless then."""
        outputs: dict[str, Tensor | None] = {name: kept[rows] for name, kept in self._kept[index].items()}
        if self._needless is not None:
            outputs[self._needless] = None
        known = {
            linear: output
            for name, output in outputs.items()
            if isinstance(linear := layer.get_submodule(name), nn.Linear)
        }
        with replaced(list(known), [_known(*each) for each in known.items()]):
            yield


def choose_outputs(
    family: Family, layers: Sequence[nn.Module], bytes_a_channel: int, budget_bytes: int
) -> list[tuple[int, str, int]]:
    """Choose what to keep within a budget: (layer, name of a projection in it, its output width) of each."""
    linears = [
        (module.in_features, module.out_features, index, name)
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name != _needless(family)
    ]
    chosen = []
    # A product of (T, I) and (I, O) takes T*I*O steps and leaves T*O numbers: I steps saved for each.
    for _, width, index, name in sorted(linears, key=lambda linear: (-linear[0], linear[2])):
        if width * bytes_a_channel <= budget_bytes:
            budget_bytes -= width * bytes_a_channel
            chosen.append((index, name, width))
    return chosen


def _needless(family: Family) -> str | None:
    """Return the projection whose output the backward pass never needs."""
    return family.last_projection if family.ends_in_sum else None


def _known(linear: nn.Linear, output: Tensor | None) -> Any:
    def forward(x: Tensor) -> Tensor:
        values = x.new_zeros(()).expand(*x.shape[:-1], linear.out_features) if output is None else output
        return _KnownLinear.apply(x, linear.weight, linear.bias, values)

    return forward


class _KnownLinear(torch.autograd.Function):
    """A linear map whose output is known: only its backward pass computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            gradient @ weight if of_x else None,
            rows.T @ x.flatten(0, -2) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
            None,
        )
