"""What recovery training learns from beside its texts: a teacher."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.model.build import dtype_of, load_model
from core.model.checkpoint import Checkpoint
from core.model.loss import Lesson, final_states
from core.settings.training import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that another one learns from.

    Attributes:
        model: Of the same vocabulary, on the same device; its weights get no gradients.
        weight: See ``Lesson``.
        temperature: See ``Lesson``.
    """

    model: "PreTrainedModel"
    weight: float
    temperature: float

    @classmethod
    def load(cls, checkpoint: Checkpoint, settings: TrainingSettings, device: torch.device) -> "Teacher":
        """Load a teacher in the precision of a training."""
        return cls(
            model=load_model(checkpoint, dtype=dtype_of(settings.precision), device=device),
            weight=settings.distillation_weight,
            temperature=settings.temperature,
        )

    @torch.no_grad()
    def lesson(self, ids: Tensor, positions: Tensor | None) -> Lesson:
        """Return what it expects of (B, T) token ids; ``positions`` are as in ``final_states``."""
        aims = final_states(self.model, ids, positions)
        return Lesson(teacher=self.model, aims=aims, weight=self.weight, temperature=self.temperature)
