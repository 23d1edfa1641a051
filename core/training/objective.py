"""What recovery training learns from beside its texts: a teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.model.build import dtype_of, load_model
from core.model.loss import Lesson, final_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.settings.training import TrainingSettings


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

    @torch.no_grad()
    def lesson(self, ids: Tensor, positions: Tensor | None) -> Lesson:
        """Return what it expects of (B, T) token ids; ``positions`` are as in ``final_states``."""
        aims = final_states(self.model, ids, positions)
        return Lesson(teacher=self.model, aims=aims, weight=self.weight, temperature=self.temperature)


def load_teacher(folder: Path, settings: "TrainingSettings", device: torch.device) -> Teacher:
    """Return the dense base model, whose checkpoint ``folder`` holds, in the precision of the training."""
    return Teacher(
        model=load_model(folder, dtype=dtype_of(settings.precision), device=device),
        weight=settings.distillation_weight,
        temperature=settings.temperature,
    )
