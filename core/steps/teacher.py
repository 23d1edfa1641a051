"""The training of a run's teacher on the run's own texts: ``training.teacher_tokens``.

It is trained by recover-train, as it takes what training takes, before the first phase that trains. Like a
phase's training it resumes; later phases find it published, and it goes when the last of them has trained.
"""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from core.data.mixture import slice_name
from core.machine.memory import free_unused
from core.model.build import dtype_of, pick_device
from core.model.checkpoint import Checkpoint, save_model
from core.runs.run import Run
from core.steps.frame import Workspace, compute_once, provenance_of, track_curves
from core.steps.training import EXPLAINING, train
from core.steps.training_plan import planned_training
from core.storage.interface import join_uri
from core.storage.layout import RESUME, TEACHER
from core.storage.publication import Publication, open_publication
from core.tracking.live import logging_live
from core.training.job import TrainingJob
from core.training.parallel.nodes import Meeting, Place
from core.training.resume import remove_states

log = logging.getLogger(__name__)


def train_teacher(run: Run, data: Publication) -> None:
    """Train the teacher on the first rows of a run's mixture, unless it is published."""
    uri = run.uri(TEACHER)
    states_uri = join_uri(uri, RESUME)
    compute = functools.partial(_compute, run, data, states_uri)
    compute_once(run, uri, phase=0, step="teacher", compute=compute, track=track_curves, whole=False)
    remove_states(states_uri)
    free_unused()  # what it took is free memory for the phase that is planned now


def _compute(run: Run, data: Publication, states_uri: str, work: Workspace) -> dict[str, Any]:
    settings, device = run.settings.training.of_teacher, pick_device().type
    assert settings is not None, "asked before"
    base = open_publication(run.base_uri)
    checkpoint = Checkpoint(base.fetch(work.scratch / "base"))
    held_out = None
    if settings.held_out_sequences:
        name = slice_name(run.settings.prune.phases + 1)
        held_out = data.fetch(work.scratch, only=[name]) / name
    plan = planned_training(checkpoint.config, None, settings, device)
    job = TrainingJob(
        checkpoint=checkpoint.directory,
        base=None,
        rows=_first_rows(data, settings.total_steps * settings.global_batch, work.scratch),
        held_out=held_out,
        settings=plan.settings,
        ranks=plan.ranks,
        sharded=plan.sharded,
        device=device,
        seed=run.settings.seed,
        first_step=0,
        total_steps=settings.total_steps,
        states_uri=states_uri,
        belongs_to=run.inputs(base.digest, data.digest),
        explaining=EXPLAINING,
        live=functools.partial(logging_live, work.child.uri, work.child.run_id),
        scratch=work.scratch,
    )
    log.info("the base model is trained on %s tokens before it teaches", settings.tokens)
    network, report = train(job, Meeting(Place()))
    network = torch.nn.Module.to(network, dtype_of(settings.precision))  # in which it teaches
    provenance = provenance_of(run, 0, base.digest, step="teacher")
    save_model(network, work.out, companions=checkpoint.directory, provenance=provenance)
    return report


def _first_rows(data: Publication, count: int, scratch: Path) -> Path:
    """Write the first rows of the mixture, which phases have in slices, into one file."""
    parts: list[dict[str, torch.Tensor]] = []
    phase, missing = 0, count
    while missing:
        name = slice_name(phase := phase + 1)
        rows = load_file(data.fetch(scratch, only=[name]) / name)
        parts.append({column: tensor[:missing] for column, tensor in rows.items()})
        missing -= len(parts[-1]["input_ids"])
    file = scratch / "rows.safetensors"
    save_file({column: torch.cat([part[column] for part in parts]) for column in parts[0]}, file)
    return file
