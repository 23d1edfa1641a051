"""The training of a phase by several ranks, for the process that starts them as if it had trained itself."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from core.model.build import load_model
from core.training.adapters import add_adapters
from core.training.job import TrainingJob, train_here
from core.training.optimizer import adamw
from core.training.parallel.launch import run_ranks
from core.training.parallel.nodes import Meeting, Place
from core.training.parallel.ranks import Ranks
from core.training.parallel.sharding import shard
from core.training.parallel.states import RankStates, write_whole
from core.training.recover import TrainingReport
from core.training.state import (
    TrainingProgress,
    TrainingState,
    restore_state,
    state_tensors,
    trained_parameters,
    write_state,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

_ALONE = Meeting(Place())


def recover_by_ranks(
    job: TrainingJob,
    model: "PreTrainedModel",
    *,
    carry: "Callable[[Optimizer], None] | None" = None,
    resume_from: TrainingState | None = None,
    hand_on: "Callable[[Optimizer], None] | None" = None,
    method: str = "spawn",
    meeting: Meeting = _ALONE,
) -> TrainingReport:
    """Train by several ranks; see ``recover``.

    Args:
        job: What to train.
        model: Gets the trained weights, in host memory.
        carry: See ``recover``.
        resume_from: See ``recover``.
        hand_on: See ``recover``.
        method: See ``run_ranks``.
        meeting: Of the nodes; only the first one's model gets the trained weights.

    Raises:
        TrainingError: As ``recover``, or if a rank ends before it is done.
    """
    optimizer = adamw(trained_parameters(model).values(), job.settings)
    torch.manual_seed(job.seed)
    if resume_from is None and carry is not None:
        carry(optimizer)
        resume_from = write_state(
            job.scratch / "carried", state_tensors(model, optimizer), TrainingProgress(), belongs_to={}
        )
        optimizer.state.clear()  # the ranks have it from there
    place = meeting.place
    work = functools.partial(_train, job, place, resume_from, hand_on is not None)
    size = job.ranks // place.nodes
    report, shards = run_ranks(work, size, job.device, method=method, place=place, check=meeting.check)
    if place.node:
        return report
    trained = TrainingState(
        directory=job.scratch / "trained", shards=shards, progress=TrainingProgress(), belongs_to={}
    )
    restore_state(trained, model, optimizer)
    if hand_on is not None:
        hand_on(optimizer)
    return report


def _train(
    job: TrainingJob, place: Place, resume_from: TrainingState | None, moments: bool, rank: int
) -> tuple[TrainingReport, int]:
    """Be a rank: train, and leave the whole result in ``scratch``."""
    with job.explaining(), ExitStack() as stack:
        return _train_explained(job, place, resume_from, moments, rank, stack)


def _train_explained(
    job: TrainingJob,
    place: Place,
    resume_from: TrainingState | None,
    moments: bool,
    rank: int,
    stack: ExitStack,
) -> tuple[TrainingReport, int]:
    index = rank % (job.ranks // place.nodes)
    device = torch.device(job.device, index) if job.device == "cuda" else torch.device(job.device)
    model = load_model(job.checkpoint)  # as it is stored: the ranks share the pages of its files
    if job.settings.lora_rank:
        torch.manual_seed(job.seed)
        add_adapters(model, job.settings.lora_rank)
    root = None
    if job.sharded:
        root = shard(model, device, job.ranks, bfloat16=job.settings.precision == "bfloat16")
    else:
        torch.nn.Module.to(model, device, torch.float32)
    files: list[int] = []

    def save(optimizer: "Optimizer", progress: TrainingProgress) -> None:
        if root is not None:
            root.reshard()
        saved.save(model, optimizer, progress)

    def hand_on(optimizer: "Optimizer") -> None:
        if root is not None:
            root.reshard()
        files.append(write_whole(job.scratch / "trained", model, optimizer, moments=moments))

    states = None if rank else stack.enter_context(job.states())
    if states is not None and resume_from is not None and resume_from.progress.losses:
        states.resume(resume_from.progress)
    saved = stack.enter_context(
        RankStates(states, job.states_folder / "saved", place=place, uri=job.states_uri)
    )
    ranks = Ranks(rank=rank, size=job.ranks, sharded=job.sharded)
    report = train_here(job, model, resume_from=resume_from, save=save, hand_on=hand_on, ranks=ranks)
    return report, files[0]
