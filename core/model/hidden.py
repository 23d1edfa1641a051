"""What a teacher's layers say beside its logits: how far a model's hidden states are from its own.

Layers keep their width outside, whatever groups go, so the output of each stands beside that of the teacher's
same layer. At a position it is |s - t|^2 / |t|^2 away: the mean squared error over the teacher's mean square.
Each position has its own scale, as some states of a language model are a thousand times as long as others.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def outputs_kept(
    model: "PreTrainedModel", layers: Iterable[int], positions: tuple[Tensor, ...]
) -> Iterator[dict[int, Tensor]]:
    """Keep what layers return for N positions, indices of (B, T), while the ``with`` block lasts.

    Yields:
        Layer to its (N, D) output, without a graph.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor) -> None:
        kept[layer] = output.detach()[positions]

    with _watched(model, layers, keep):
        yield kept


@dataclass(frozen=True, kw_only=True)
class HiddenLesson:
    """What a teacher's layers return at the positions of a batch, for one forward pass of what is taught.

    Attributes:
        aims: Layer to (N, D) outputs, which are let go one by one.
        positions: Indices of (B, T): the N positions.
        weight: On the distance, beside the rest of the loss.
    """

    aims: dict[int, Tensor]
    positions: tuple[Tensor, ...]
    weight: float

    @contextmanager
    def taught(self, model: "PreTrainedModel", *, scale: float) -> Iterator[Tensor]:
        """Let the layers of a model learn from it; the forward pass goes into the ``with`` block.

        The backward pass then adds the gradient of ``scale * weight`` times the distance. All else is let go.

        Yields:
            Float64, on the device: the distance, summed over positions, mean over the layers. It is complete
            when the forward pass is.
        """
        total, layers = torch.zeros((), dtype=torch.float64, device=model.device), len(self.aims)
        factor = 2 * scale * self.weight / layers

        def teach(layer: int, output: Tensor) -> None:
            states = output.detach()[self.positions]
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            aim = self.aims.pop(layer).to(states.dtype)
            squares = aim.square().sum(dim=-1, keepdim=True).clamp_min_(torch.finfo(aim.dtype).tiny)
            apart = states - aim
            total.add_((apart.square().sum(dim=-1, keepdim=True) / squares).double().sum() / layers)
            output.register_hook(functools.partial(_added, self.positions, apart.mul_(factor / squares)))

        with _watched(model, list(self.aims), teach):
            yield total


def _added(positions: tuple[Tensor, ...], more: Tensor, gradient: Tensor) -> Tensor:
    return gradient.index_put(positions, more.to(gradient.dtype), accumulate=True)


@contextmanager
def _watched(
    model: "PreTrainedModel", layers: Iterable[int], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call ``see`` with the number and the output of each of some layers that runs meanwhile."""
    modules = list(model.get_submodule(family_of(model.config).layers).children())

    def hook(layer: int, _: nn.Module, inputs: object, output: Tensor) -> None:
        see(layer, output)

    # They are outside of gradient checkpointing, which runs a layer's own code again.
    hooks = [modules[layer].register_forward_hook(functools.partial(hook, layer)) for layer in layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
