"""The step that trains: recover-train."""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import SettingsError
from core.pruning.phases import phase_steps
from core.runs.run import Run
from core.scratch import scratch_folder
from core.steps.carrying import leave_moments, leaves_moments, moments_before, take_moments
from core.steps.frame import (
    Artifact,
    Workspace,
    compute_once,
    describe_checkpoint,
    provenance_of,
    track_curves,
    tracker_of,
)
from core.storage.interface import join_uri
from core.storage.layout import RESUME, TEACHER
from core.storage.publication import Publication, find_publication, open_publication
from core.tracking.live import logging_live
from core.tracking.mlflow import ChildRun
from core.training.parallel.nodes import Meeting, MeetingOverError, Place
from core.training.resume import remove_states

if TYPE_CHECKING:
    from core.model.checkpoint import Checkpoint
    from core.training.job import TrainingJob

log = logging.getLogger(__name__)

OnNodes = Callable[[Run, int, str, str], None]
"""Has a phase trained by several nodes: gets the run, the phase, and the URIs of checkpoint and data."""


def run_recover_train(
    *,
    run: Mapping[str, Any],
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    model: Artifact,
    on_nodes: OnNodes | None = None,
) -> str:
    """Train the pruned checkpoint on the phase's slice of the mixture.

    A task that was killed and is started again resumes from the last saved training state.

    Args:
        run: The run's handle.
        phase: The phase.
        checkpoint_uri: The pruned checkpoint.
        data_uri: The mixture.
        model: Describes the recovered checkpoint.
        on_nodes: Has it trained on ``training.nodes`` nodes, each of which calls ``train_on_node``.

    Returns:
        URI of the recovered checkpoint; the pruned one's where the recipe asks for no training.
    """
    this = Run.load(run)
    if not _steps(this)[phase - 1]:
        log.info("training.tokens=%s: nothing to train", this.settings.training.tokens)
        describe_checkpoint(open_publication(checkpoint_uri), model)
        return checkpoint_uri
    uri = this.phase_uri(phase, "recovered")
    if on_nodes is not None and this.settings.training.nodes > 1 and find_publication(uri) is None:
        with this.working():
            on_nodes(this, phase, checkpoint_uri, data_uri)
    if this.settings.training.of_teacher is not None and find_publication(uri) is None:
        from core.steps.teacher import train_teacher

        train_teacher(this, open_publication(data_uri))
    published = _publish(this, phase, checkpoint_uri, data_uri, Meeting(Place()))
    remove_states(_states_uri(this, phase))
    describe_checkpoint(published, model)
    return uri


def train_on_node(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, place: Place
) -> None:
    """Be one of the nodes that train a phase together; the first one publishes."""
    this = Run.load(run)
    uri = this.phase_uri(phase, "recovered")
    meeting = Meeting(place, lambda: find_publication(uri) is not None)
    with contextlib.suppress(MeetingOverError), meeting:
        if place.node == 0:
            _publish(this, phase, checkpoint_uri, data_uri, meeting)
        else:
            with scratch_folder() as folder:
                work = Workspace(out=folder / "out", scratch=folder, child=ChildRun(tracker_of(this), ""))
                _compute(this, phase, checkpoint_uri, data_uri, meeting, work)


def _publish(run: Run, phase: int, checkpoint_uri: str, data_uri: str, meeting: Meeting) -> Publication:
    compute = functools.partial(_compute, run, phase, checkpoint_uri, data_uri, meeting)
    uri = run.phase_uri(phase, "recovered")
    return compute_once(run, uri, phase=phase, step="recover-train", compute=compute, track=track_curves)


def _steps(run: Run) -> tuple[int, ...]:
    return phase_steps(run.settings.training.total_steps, run.settings.prune.phases)


def _states_uri(run: Run, phase: int) -> str:
    return join_uri(run.phase_uri(phase, "recovered"), RESUME)


def _compute(
    run: Run, phase: int, checkpoint_uri: str, data_uri: str, meeting: Meeting, work: Workspace
) -> dict[str, Any]:
    import torch

    from core.machine.precision import warn_if_emulated
    from core.model.build import pick_device
    from core.model.checkpoint import Checkpoint, save_model
    from core.steps.formats import written_format
    from core.steps.training import train

    if (nodes := run.settings.training.nodes) != meeting.place.nodes:
        problem = f"training.nodes={nodes}, but nodes that train here: {meeting.place.nodes}. "
        raise SettingsError([problem + "Several train on a cluster alone, by Kubeflow Trainer."])
    warn_if_emulated("training", run.settings.training.precision, pick_device())
    source = open_publication(checkpoint_uri)
    checkpoint = Checkpoint(source.fetch(work.scratch / "checkpoint"))
    before = moments_before(run, phase)
    inputs = {"checkpoint": source.digest} | ({} if before is None else {"moments": before.digest})
    job, figures = _job(run, phase, checkpoint, open_publication(data_uri), inputs, meeting, work)
    carry = hand_on = None
    if before is not None:
        carry = functools.partial(take_moments, run, phase, before, work.scratch)
    if leaves_moments(run, phase):
        hand_on = functools.partial(leave_moments, run, phase, work.scratch)
    network, report = train(job, meeting, carry=carry, hand_on=hand_on)
    if meeting.place.node:
        return {}
    dtype, final = written_format(run, phase, checkpoint, trained=True)
    provenance = provenance_of(run, phase, source.digest, step="recover-train") | final
    save_model(
        torch.nn.Module.to(network, dtype), work.out, companions=checkpoint.directory, provenance=provenance
    )
    return report | figures


def _job(
    run: Run,
    phase: int,
    checkpoint: "Checkpoint",
    data: Publication,
    inputs: Mapping[str, str],
    meeting: Meeting,
    work: Workspace,
) -> "tuple[TrainingJob, dict[str, float]]":
    """Decide how the phase trains, and fetch what it takes.

    Args:
        run: The run.
        phase: The phase.
        checkpoint: What is trained.
        data: Has the slices.
        inputs: Digests of what it starts from.
        meeting: The nodes that train.
        work: Where to put things.

    Returns:
        The training, and figures of its teacher.
    """
    from core.data.mixture import slice_name
    from core.model.build import pick_device
    from core.model.checkpoint import Checkpoint
    from core.steps.footprint import explaining_memory
    from core.steps.lessons import LessonTask, store_lessons
    from core.steps.training import EXPLAINING
    from core.steps.training_plan import agreed_plan, planned_training
    from core.training.job import TrainingJob

    def fetched(phase: int) -> Path:
        name = slice_name(phase)
        return data.fetch(work.scratch, only=[name]) / name

    settings, device, dense = run.settings, pick_device().type, None
    rows = fetched(phase)
    lessons: tuple[Path, ...] = ()
    figures: dict[str, float] = {}
    if settings.training.teacher == "base":
        corrected = settings.training.of_teacher is not None
        teacher = open_publication(run.uri(TEACHER) if corrected else run.base_uri)
        dense = Checkpoint(teacher.fetch(work.scratch / "base"))
        if corrected:
            inputs = {**inputs, "teacher": teacher.digest}
        if settings.training.teacher_logits == "stored":
            task = LessonTask(
                uri=join_uri(_states_uri(run, phase), "lessons"),
                base=dense.directory,
                rows=rows,
                settings=settings.training,
                made_of={"base": teacher.digest, "data": data.digest, "settings": settings.digest()},
                device=device,
                explaining=functools.partial(explaining_memory, "training.teacher=none", resumes=False),
                scratch=work.scratch / "lessons",
            )
            lessons, figures = store_lessons(task)
            dense = None
    taught_by = None if dense is None else dense.config
    plan = agreed_plan(planned_training(checkpoint.config, taught_by, settings.training, device), meeting)
    job = TrainingJob(
        checkpoint=checkpoint.directory,
        base=None if dense is None else dense.directory,
        rows=rows,
        lessons=lessons,
        held_out=fetched(settings.prune.phases + 1) if settings.training.held_out_sequences else None,
        settings=plan.settings,
        ranks=plan.ranks,
        sharded=plan.sharded,
        device=device,
        seed=settings.seed + phase,
        first_step=sum(_steps(run)[: phase - 1]),
        total_steps=settings.training.total_steps,
        states_uri=_states_uri(run, phase),
        belongs_to={**inputs, "data": data.digest, "settings": settings.digest()},
        explaining=EXPLAINING,
        live=functools.partial(logging_live, work.child.uri, work.child.run_id),
        scratch=work.scratch,
    )
    return job, figures
