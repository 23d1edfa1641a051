"""The step that trains: recover-train."""

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.pruning.phases import phase_steps
from core.quantities import parse_interval
from core.runs.run import Run
from core.settings.training import TrainingSettings
from core.steps.carrying import leave_moments, leaves_moments, moments_before, take_moments
from core.steps.frame import Artifact, Workspace, compute_once, describe_checkpoint, provenance_of
from core.storage.interface import join_uri
from core.storage.publication import Publication, open_publication
from core.tracking.mlflow import ChildRun
from core.training.resume import SavedStates, remove_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.training.objective import Teacher
    from core.training.recover import TrainingReport
    from core.training.state import TrainingState

log = logging.getLogger(__name__)


def run_recover_train(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, model: Artifact
) -> str:
    """Train the pruned checkpoint on the phase's slice of the mixture.

    A task that was killed and is started again resumes from the last saved training state.

    Returns:
        URI of the recovered checkpoint; the pruned one's where the recipe asks for no training.
    """
    this = Run.load(run)
    if not _steps(this)[phase - 1]:
        log.info("training.tokens=%s: nothing to train", this.settings.training.tokens)
        describe_checkpoint(open_publication(checkpoint_uri), model)
        return checkpoint_uri
    uri = this.phase_uri(phase, "recovered")
    compute = functools.partial(_compute, this, phase, checkpoint_uri, data_uri)
    published = compute_once(this, uri, phase=phase, step="recover-train", compute=compute, track=_track)
    remove_states(_states_uri(this, phase))
    describe_checkpoint(published, model)
    return uri


def _steps(run: Run) -> tuple[int, ...]:
    return phase_steps(run.settings.training.total_steps, run.settings.prune.phases)


def _first_step(run: Run, phase: int) -> int:
    return sum(_steps(run)[: phase - 1])


def _states_uri(run: Run, phase: int) -> str:
    return join_uri(run.phase_uri(phase, "recovered"), "_resume")


def _compute(run: Run, phase: int, checkpoint_uri: str, data_uri: str, work: Workspace) -> dict[str, Any]:
    import torch

    from core.machine.precision import warn_if_emulated
    from core.model.build import load_model, pick_device
    from core.model.checkpoint import Checkpoint, save_model
    from core.steps.footprint import explaining_memory, planned_training
    from core.steps.formats import written_format
    from core.training.adapters import add_adapters
    from core.training.objective import Teacher

    warn_if_emulated("training", run.settings.training.precision, pick_device())
    source, data = open_publication(checkpoint_uri), open_publication(data_uri)
    folder = source.fetch(work.scratch / "checkpoint")
    checkpoint = Checkpoint(folder)
    training, dense = run.settings.training, None
    if training.teacher == "base":
        dense = Checkpoint(open_publication(run.base_uri).fetch(work.scratch / "base"))
    taught_by = None if dense is None else dense.config
    settings = planned_training(checkpoint.config, taught_by, training, pick_device().type)
    network = load_model(checkpoint, dtype=torch.float32, device=pick_device())
    adapters = None
    if settings.lora_rank:
        torch.manual_seed(run.settings.seed + phase)
        adapters = add_adapters(network, settings.lora_rank)
    belongs_to = {"checkpoint": source.digest, "data": data.digest, "settings": run.settings.digest()}
    before = moments_before(run, phase)
    if before is not None:
        belongs_to["moments"] = before.digest
    teacher = None if dense is None else Teacher.load(dense, settings, pick_device())
    with SavedStates(
        _states_uri(run, phase),
        work.scratch / "states",
        every=parse_interval(run.settings.training.save_every),
        belongs_to=belongs_to,
    ) as states:
        state = states.newest(network, first_step=_first_step(run, phase))
        optimizer_state: dict[str, Any] = {"save": functools.partial(states.save, network)}
        if before is not None:
            optimizer_state["carry"] = functools.partial(
                take_moments, run, phase, before, network, work.scratch
            )
        if leaves_moments(run, phase):
            optimizer_state["hand_on"] = functools.partial(leave_moments, run, phase, network, work.scratch)
        with explaining_memory("training.micro_batch=0 or lower, or training.gradient_checkpointing=true"):
            trained = _train(run, phase, network, teacher, data, settings, work, state, optimizer_state)
    if adapters is not None:
        adapters.merge_and_unload()
    dtype, final = written_format(run, phase, checkpoint, trained=True)
    provenance = provenance_of(run, phase, source.digest, step="recover-train") | final
    save_model(torch.nn.Module.to(network, dtype), work.out, companions=folder, provenance=provenance)
    return {
        "losses": trained.losses,
        "series": trained.series,
        "tokens": trained.tokens,
        "trained_tokens": trained.trained_tokens,
        "tokens_per_s": trained.tokens_per_s,
        "seconds": state.progress.seconds if state else 0.0,
    }


def _track(child: ChildRun, report: dict[str, Any], _: Publication) -> None:
    losses = report.get("losses", ())
    child.log_series("loss", [(step, loss) for step, loss, _ in losses])
    child.log_series("learning_rate", [(step, rate) for step, _, rate in losses])
    for name, points in report.get("series", {}).items():
        child.log_series(name, [(step, value) for step, value in points])


def _train(
    run: Run,
    phase: int,
    network: "PreTrainedModel",
    teacher: "Teacher | None",
    data: Publication,
    settings: TrainingSettings,
    work: Workspace,
    state: "TrainingState | None",
    optimizer_state: Mapping[str, Any],
) -> "TrainingReport":
    import torch
    from safetensors.torch import load_file

    from core.data.mixture import slice_name
    from core.training.recover import recover
    from core.training.rows import Rows

    def rows(phase: int) -> Rows:
        name = slice_name(phase)
        tensors = load_file(data.fetch(work.scratch, only=[name]) / name)
        # Without starts where rows are cut anywhere.
        return Rows(tensors["input_ids"], tensors["trained"], tensors.get("starts"))

    torch.manual_seed(run.settings.seed + phase)
    return recover(
        network,
        rows(phase),
        settings,
        held_out=rows(run.settings.prune.phases + 1) if settings.held_out_sequences else None,
        teacher=teacher,
        first_step=_first_step(run, phase),
        total_steps=run.settings.training.total_steps,
        resume_from=state,
        **optimizer_state,
    )
