"""Where a measurement stands between two layers: one that was killed goes on there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.pruning.scoring.statistics import LayerScores


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a measurement of L layers knows between two of them.

    Attributes:
        number: Up to L: all layers below ``number`` have run. Above L: all of them and the head have, and the
            backward pass is done with the layers from 2 L + 1 - ``number`` on.
        states: (S, T, D) hidden states that enter the next layer, or the gradient of the loss by them.
        similarities: (L,) float64, sums over tokens; 0 for layers that have not run.
        scores: Number of a layer to its scores.
        loss: Nats a token; 0 before the head has run.
    """

    number: int
    states: Tensor
    similarities: Tensor
    scores: Mapping[int, LayerScores]
    loss: float = 0.0


class Stages(Protocol):
    """Keeps stages, and has those of an earlier attempt."""

    newest: Stage | None
    """The one to go on from, once ``agree`` has been called."""

    def agree(self, way: Mapping[str, int], most: Mapping[str, int]) -> Mapping[str, int]:
        """Return how to compute: as the earlier attempt did, as the last bits depend on it.

        Args:
            way: How this one would.
            most: What fits into the memory. What is kept is not used if it takes much more.
        """

    def states(self, number: int) -> Tensor | None:
        """Return the states of a stage; None if it is not kept."""

    def turn(self) -> None:
        """Begin the backward pass."""

    def is_due(self, share: float, size: int) -> bool:
        """Return whether to keep a stage now; call it after each layer.

        Args:
            share: Of the whole work, that is done.
            size: Bytes of the states.
        """

    def keep(self, make: Callable[[], Stage], superseded: range) -> None:
        """Keep what ``make`` returns, and remove the stages of some numbers when that is done."""
