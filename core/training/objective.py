"""What recovery training learns from beside its texts: a teacher."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file

from core.model.build import dtype_of, load_model
from core.model.decoder import final_states
from core.model.hidden import HiddenLesson, outputs_kept
from core.model.loss import (
    Lesson,
    StoredLesson,
    chunk_positions,
    counted_positions,
    head_logits,
    likeliest,
)
from core.training.lessons import IDS, LOGS, format_of_ids
from core.training.rows import MicroBatch, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.settings.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a model learns from beside the next token.

    Attributes:
        model: Of the same vocabulary, on the same device; its weights get no gradients. None where what it
            expects is stored with the rows.
        weight: See ``Lesson``.
        temperature: See ``Lesson``.
        hidden_weight: See ``HiddenLesson``; 0 where its layers teach nothing.
        hidden_layers: Those that teach; none for all.
    """

    model: "PreTrainedModel | None"
    weight: float
    temperature: float
    hidden_weight: float = 0.0
    hidden_layers: tuple[int, ...] = ()

    @torch.no_grad()
    def lesson(self, part: MicroBatch) -> tuple[Lesson | StoredLesson, HiddenLesson | None]:
        """Return what it expects of a micro-batch, and what its layers say."""
        if self.model is None:
            assert part.expected is not None, "the rows were read with it"
            ids, logs = part.expected
            stored = StoredLesson(ids=ids, logs=logs, weight=self.weight, temperature=self.temperature)
            return stored, None
        layers: Iterable[int] = ()
        if self.hidden_weight:
            layers = self.hidden_layers or range(self.model.config.num_hidden_layers)
        positions = counted_positions(part.trained, part.ids.device)
        with outputs_kept(self.model, layers, positions) as kept:
            aims = final_states(self.model, part.ids, part.documents)
        lesson = Lesson(teacher=self.model, aims=aims, weight=self.weight, temperature=self.temperature)
        hidden = HiddenLesson(aims=kept, positions=positions, weight=self.hidden_weight) if kept else None
        return lesson, hidden


def load_teacher(folder: Path | None, settings: "TrainingSettings", device: torch.device) -> Teacher | None:
    """Return the teacher that the settings ask for.

    Args:
        folder: Checkpoint of the dense base model, which is loaded in the precision of the training; None if
            it is not needed.
        settings: Of the training.
        device: Where the training is.
    """
    if settings.teacher == "none":
        return None
    model = None if folder is None else load_model(folder, dtype=dtype_of(settings.precision), device=device)
    return Teacher(
        model=model,
        weight=settings.distillation_weight,
        temperature=settings.temperature,
        hidden_weight=settings.hidden_weight,
        hidden_layers=settings.hidden_layers,
    )


class Coverage(NamedTuple):
    """How much of what a teacher expects is stored, summed over positions."""

    positions: int
    """Their number."""
    kept: float
    """Probability of the K tokens."""
    left_out: float
    """Divergence, in nats, of all other tokens being as likely as each other."""


@torch.no_grad()
def write_lessons(
    model: "PreTrainedModel", rows: Rows, file: Path, *, top_k: int, temperature: float, micro_batch: int
) -> Coverage:
    """Write what a model expects at the trained positions of rows.

    Args:
        model: The teacher.
        rows: Packed sequences.
        file: Where it goes.
        top_k: K; at most the vocabulary's size is taken.
        temperature: What logits are divided by.
        micro_batch: Sequences at once.
    """
    vocabulary = int(model.config.vocab_size)
    count, size = min(top_k, vocabulary), chunk_positions(vocabulary, model.device.type)
    ids, logs, kept, left_out = [], [], 0.0, 0.0
    for part in rows.micro_batches(micro_batch, model.device):
        states = final_states(model, part.ids, part.documents)
        for chunk in states[:, :-1][counted_positions(part.trained, model.device)].split(size):
            tokens, found, lost = likeliest(head_logits(model, chunk), count, temperature)
            ids.append(tokens.to("cpu", format_of_ids(vocabulary)))
            logs.append(found.to("cpu", torch.float16))
            kept += (1 - found[:, -1].exp()).double().sum().item()
            left_out += lost.double().sum().item()
    save_file({IDS: torch.cat(ids), LOGS: torch.cat(logs)}, file)
    return Coverage(sum(map(len, ids)), kept, left_out)
