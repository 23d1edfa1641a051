"""The training of a phase: all that it is given, for the process or the ranks that do it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.quantities import parse_interval
from core.settings.training import TrainingSettings
from core.training.attention import attention_of
from core.training.compilation import check_compiler
from core.training.objective import load_teacher
from core.training.parallel.ranks import ALONE, Ranks
from core.training.recover import Live, TrainingReport, recover
from core.training.resume import SavedStates
from core.training.rows import read_rows
from core.training.state import TrainingProgress, TrainingState

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is trained, on what, and how; it can be pickled.

    Attributes:
        checkpoint: Folder of the model.
        base: Folder of the model that teaches; None if none has to be loaded.
        rows: File of the phase's slice of the mixture.
        lessons: Files of what a teacher expects of them, if that is stored.
        held_out: File of the rows to measure the loss on; None for none.
        settings: As for ``recover``, with what a rank takes at once as ``micro_batch``.
        ranks: Number of processes that train together.
        sharded: Whether they share out weights, gradients and moments.
        device: Type of the device.
        seed: Of the random generators, if no state is resumed.
        first_step: As for ``recover``.
        total_steps: As for ``recover``.
        states_uri: Where its states are saved, and found again.
        belongs_to: The inputs of the training. A state with other inputs is not used.
        explaining: Turns running out of memory into one line.
        live: Shows the curves while they grow; of several ranks the first one calls it.
        scratch: Folder for files that are removed afterwards.
    """

    checkpoint: Path
    base: Path | None
    rows: Path
    lessons: tuple[Path, ...] = ()
    held_out: Path | None
    settings: TrainingSettings
    ranks: int
    sharded: bool
    device: str
    seed: int
    first_step: int
    total_steps: int
    states_uri: str
    belongs_to: Mapping[str, str]
    explaining: Callable[[], AbstractContextManager[None]]
    live: Live
    scratch: Path

    @property
    def states_folder(self) -> Path:
        """Where its states are written before they are published."""
        return self.scratch / "states"

    def states(self) -> SavedStates:
        """Return its saved states, for one process at a time."""
        every = None if self.settings.save_every == "auto" else parse_interval(self.settings.save_every)
        return SavedStates(self.states_uri, self.states_folder, every=every, belongs_to=self.belongs_to)


def train_here(
    job: TrainingJob,
    model: "PreTrainedModel",
    *,
    carry: "Callable[[Optimizer], None] | None" = None,
    resume_from: TrainingState | None = None,
    save: "Callable[[Optimizer, TrainingProgress], None] | None" = None,
    hand_on: "Callable[[Optimizer], None] | None" = None,
    ranks: Ranks = ALONE,
) -> TrainingReport:
    """Train by this process, alone or as one of the ranks; arguments are those of ``recover``."""
    if job.settings.compile:
        check_compiler(model.device)
    teacher = load_teacher(job.base, job.settings, model.device)
    torch.manual_seed(job.seed)
    with attention_of(job.settings, model, teacher.model if teacher else None):
        return recover(
            model,
            read_rows(job.rows, job.lessons),
            job.settings,
            held_out=None if job.held_out is None else read_rows(job.held_out),
            teacher=teacher,
            first_step=job.first_step,
            total_steps=job.total_steps,
            carry=carry,
            resume_from=resume_from,
            save=save,
            hand_on=hand_on,
            live=None if ranks.rank else job.live,
            ranks=ranks,
        )
