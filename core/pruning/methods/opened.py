"""The model of a phase, opened for a method that decides by more than statistics, or makes a model itself."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.model.layerwise import LayerwiseModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Parts = Iterable[Mapping[str, Tensor]]
"""A model's tensors by name: those of each decoder layer, then the rest."""


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
        figures: Gets what it took.
    """

    model: LayerwiseModel
    tokens: Tensor
    micro_batch: int
    autocast: bool
    seed: int
    remake: Callable[["PreTrainedConfig", Parts], None]
    figures: dict[str, Any] = field(default_factory=dict)
