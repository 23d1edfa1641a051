"""The training of a phase by several ranks, for the process that starts them as if it had trained itself."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.model.build import load_model
from core.settings.training import TrainingSettings
from core.training.adapters import add_adapters
from core.training.objective import load_teacher
from core.training.optimizer import adamw
from core.training.parallel.launch import run_ranks
from core.training.parallel.ranks import Ranks
from core.training.parallel.sharding import shard
from core.training.parallel.states import RankStates, write_whole
from core.training.recover import TrainingReport, recover
from core.training.resume import SavedStates
from core.training.rows import read_rows
from core.training.state import (
    TrainingProgress,
    TrainingState,
    restore_state,
    trained_parameters,
    write_state,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """What each rank trains; it can be pickled.

    Attributes:
        ranks: Number of ranks.
        device: Type of the device.
        sharded: Whether weights, gradients and moments are shared out.
        checkpoint: Folder of the model.
        base: Folder of the model that teaches; None without a teacher.
        rows: File of the phase's slice of the mixture.
        held_out: File of the rows to measure the loss on; None for none.
        settings: As for ``recover``, with what a rank takes at once as ``micro_batch``.
        seed: Of the random generators, if no state is resumed.
        first_step: As for ``recover``.
        total_steps: As for ``recover``.
        saving: Arguments of ``SavedStates``.
        explaining: Turns running out of memory into one line.
        scratch: Folder for what goes to the ranks, and what comes back.
    """

    ranks: int
    device: str
    sharded: bool
    checkpoint: Path
    base: Path | None
    rows: Path
    held_out: Path | None
    settings: TrainingSettings
    seed: int
    first_step: int
    total_steps: int
    saving: Mapping[str, Any]
    explaining: Callable[[], AbstractContextManager[None]]
    scratch: Path


def recover_by_ranks(
    job: RankJob,
    model: "PreTrainedModel",
    *,
    carry: "Callable[[Optimizer], None] | None" = None,
    resume_from: TrainingState | None = None,
    hand_on: "Callable[[Optimizer], None] | None" = None,
    method: str = "spawn",
) -> TrainingReport:
    """Train by several ranks; see ``recover``.

    Args:
        job: What to train.
        model: Gets the trained weights, in host memory.
        carry: See ``recover``.
        resume_from: See ``recover``.
        hand_on: See ``recover``.
        method: See ``run_ranks``.

    Raises:
        TrainingError: As ``recover``, or if a rank ends before it is done.
    """
    optimizer = adamw(trained_parameters(model).values(), job.settings)
    torch.manual_seed(job.seed)
    if resume_from is None and carry is not None:
        carry(optimizer)
        resume_from = write_state(
            job.scratch / "carried", model, optimizer, TrainingProgress(), belongs_to={}
        )
    work = functools.partial(_train, job, resume_from, hand_on is not None)
    report, shards = run_ranks(work, job.ranks, job.device, method=method)
    trained = TrainingState(
        directory=job.scratch / "trained", shards=shards, progress=TrainingProgress(), belongs_to={}
    )
    restore_state(trained, model, optimizer)
    if hand_on is not None:
        hand_on(optimizer)
    return report


def _train(
    job: RankJob, resume_from: TrainingState | None, moments: bool, rank: int
) -> tuple[TrainingReport, int]:
    """Be a rank: train, and leave the whole result in ``scratch``."""
    with job.explaining(), ExitStack() as stack:
        return _train_explained(job, resume_from, moments, rank, stack)


def _train_explained(
    job: RankJob, resume_from: TrainingState | None, moments: bool, rank: int, stack: ExitStack
) -> tuple[TrainingReport, int]:
    device = torch.device(job.device, rank) if job.device == "cuda" else torch.device(job.device)
    model = load_model(job.checkpoint)  # as it is stored: the ranks share the pages of its files
    if job.settings.lora_rank:
        torch.manual_seed(job.seed)
        add_adapters(model, job.settings.lora_rank)
    root = None
    if job.sharded:
        root = shard(model, device, job.ranks, bfloat16=job.settings.precision == "bfloat16")
    else:
        torch.nn.Module.to(model, device, torch.float32)
    teacher = None if job.base is None else load_teacher(job.base, job.settings, device)
    torch.manual_seed(job.seed)
    files: list[int] = []

    def save(optimizer: "Optimizer", progress: TrainingProgress) -> None:
        if root is not None:
            root.reshard()
        saved.save(model, optimizer, progress)

    def hand_on(optimizer: "Optimizer") -> None:
        if root is not None:
            root.reshard()
        files.append(write_whole(job.scratch / "trained", model, optimizer, moments=moments))

    states = None if rank else stack.enter_context(SavedStates(**job.saving))
    if states is not None and resume_from is not None:
        states.resume(resume_from.progress)
    saved = stack.enter_context(RankStates(states, job.saving["folder"] / "saved"))
    report = recover(
        model,
        read_rows(job.rows),
        job.settings,
        held_out=None if job.held_out is None else read_rows(job.held_out),
        teacher=teacher,
        first_step=job.first_step,
        total_steps=job.total_steps,
        resume_from=resume_from,
        save=save,
        hand_on=hand_on,
        ranks=Ranks(rank=rank, size=job.ranks, sharded=job.sharded),
    )
    return report, files[0]
