"""The model of a phase, opened for a method that decides by more than statistics, or makes a model itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from core.model.layerwise import LayerwiseModel

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer
    from transformers import PreTrainedConfig

Parts = Iterable[Mapping[str, Tensor]]
"""A model's tensors by name: those of each decoder layer, then the rest."""


class KeptTraining(Protocol):
    """What keeps a training of a method, so that the next attempt goes on where this one was killed."""

    def restore(self, learner: "Module", optimizer: "Optimizer") -> tuple[list[float], float]:
        """Load what is kept; return the loss of each step that is done, and the seconds these took."""

    def save(
        self, learner: "Module", optimizer: "Optimizer", losses: Sequence[float], seconds: float
    ) -> None:
        """Keep it, if that is due. Called between steps."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """What a phase begins with, in memory or read a layer at a time.

    Attributes:
        model: The model; a method may change its weights.
        tokens: (S, T) token ids of the calibration corpus.
        micro_batch: Sequences that pass through it at once; 0 for as many as the method thinks fit.
        autocast: Whether products are bfloat16 where it is trained.
        seed: Of what is drawn.
        remake: Takes the config and the tensors of the model that a method makes of this one. The plan then
            names groups of that model, and that model is cut.
        kept: Keeps what is trained; None within it where nothing does.
        figures: Gets what it took.
    """

    model: LayerwiseModel
    tokens: Tensor
    micro_batch: int
    autocast: bool
    seed: int
    remake: Callable[["PreTrainedConfig", Parts], None]
    kept: AbstractContextManager[KeptTraining | None] = field(default_factory=nullcontext)
    figures: dict[str, Any] = field(default_factory=dict)
