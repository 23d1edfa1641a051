"""What recovery training minimizes: the next-token loss, and the divergence from a teacher."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.model.loss import Lesson, final_states, loss_gradient

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

    @torch.no_grad()
    def lesson(self, ids: Tensor, positions: Tensor | None) -> Lesson:
        """Return what it expects of (B, T) token ids; ``positions`` are as in ``final_states``."""
        aims = final_states(self.model, ids, positions)
        return Lesson(teacher=self.model, aims=aims, weight=self.weight, temperature=self.temperature)


def accumulate_gradients(
    model: "PreTrainedModel",
    ids: Tensor,
    positions: Tensor | None,
    trained: Tensor,
    *,
    scale: float,
    autocast: bool,
    teacher: Teacher | None,
) -> float:
    """Add the gradients of a micro-batch to those of the model.

    Args:
        model: It is trained.
        ids: (B, T) int64 token ids on its device.
        positions: (B, T) int64; see ``final_states``.
        trained: (B, T), nonzero where a token counts.
        scale: Factor on the gradients, such as 1 / trained tokens of the global batch.
        autocast: Whether products are bfloat16.
        teacher: None for the next-token loss alone.

    Returns:
        The loss summed over the trained tokens, unscaled.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        # The teacher goes first, as the activations of the model stay.
        lesson = None if teacher is None else teacher.lesson(ids, positions)
        states = final_states(model, ids, positions)
        loss, gradient = loss_gradient(model, states, ids, scale=scale, trained=trained, lesson=lesson)
    states.backward(gradient)
    return loss
