"""The step that trains: recover-train."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.pruning.phases import phase_steps
from core.quantities import parse_interval
from core.runs.run import Run
from core.steps.carrying import leave_moments, leaves_moments, moments_before, take_moments
from core.steps.frame import Artifact, Workspace, compute_once, describe_checkpoint, provenance_of
from core.storage.interface import join_uri
from core.storage.publication import Publication, open_publication
from core.tracking.mlflow import ChildRun
from core.training.resume import SavedStates, remove_states

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from core.model.checkpoint import Checkpoint
    from core.steps.training_plan import TrainingPlan
    from core.training.recover import TrainingReport
    from core.training.state import TrainingProgress

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
    from core.steps.formats import written_format
    from core.steps.training_plan import planned_training
    from core.training.adapters import add_adapters

    warn_if_emulated("training", run.settings.training.precision, pick_device())
    source, data = open_publication(checkpoint_uri), open_publication(data_uri)
    folder = source.fetch(work.scratch / "checkpoint")
    checkpoint = Checkpoint(folder)
    training, dense = run.settings.training, None
    if training.teacher == "base":
        dense = Checkpoint(open_publication(run.base_uri).fetch(work.scratch / "base"))
    taught_by = None if dense is None else dense.config
    plan = planned_training(checkpoint.config, taught_by, training, pick_device().type)
    place = pick_device() if plan.ranks == 1 else "cpu"  # the ranks have the devices
    network = load_model(checkpoint, dtype=torch.float32, device=place)
    adapters = None
    if training.lora_rank:
        torch.manual_seed(run.settings.seed + phase)
        adapters = add_adapters(network, training.lora_rank)
    belongs_to = {"checkpoint": source.digest, "data": data.digest, "settings": run.settings.digest()}
    before = moments_before(run, phase)
    if before is not None:
        belongs_to["moments"] = before.digest
    saving: dict[str, Any] = {
        "uri": _states_uri(run, phase),
        "folder": work.scratch / "states",
        "every": parse_interval(run.settings.training.save_every),
        "belongs_to": belongs_to,
    }
    with SavedStates(**saving) as states:
        found = states.newest(network, first_step=_first_step(run, phase))
        state: dict[str, Any] = {"resume_from": found}
        if before is not None:
            state["carry"] = functools.partial(take_moments, run, phase, before, network, work.scratch)
        if leaves_moments(run, phase):
            state["hand_on"] = functools.partial(leave_moments, run, phase, network, work.scratch)
        save = functools.partial(states.save, network)
        trained = _train(run, phase, network, folder, dense, data, plan, work, saving, save, state)
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
        "seconds": found.progress.seconds if found else 0.0,
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
    checkpoint: Path,
    dense: "Checkpoint | None",
    data: Publication,
    plan: "TrainingPlan",
    work: Workspace,
    saving: Mapping[str, Any],
    save: "Callable[[Optimizer, TrainingProgress], None]",
    state: Mapping[str, Any],
) -> "TrainingReport":
    """Train ``network`` in this process, or have it trained by ranks that load ``checkpoint``."""
    import torch

    from core.data.mixture import slice_name
    from core.model.build import pick_device
    from core.steps.footprint import explaining_memory
    from core.training.objective import load_teacher
    from core.training.parallel.training import RankJob, recover_by_ranks
    from core.training.recover import recover
    from core.training.rows import read_rows

    def fetched(phase: int) -> Path:
        name = slice_name(phase)
        return data.fetch(work.scratch, only=[name]) / name

    settings, rows = plan.settings, fetched(phase)
    held_out = fetched(run.settings.prune.phases + 1) if settings.held_out_sequences else None
    steps: dict[str, Any] = {
        "first_step": _first_step(run, phase),
        "total_steps": run.settings.training.total_steps,
    }
    explaining = functools.partial(
        explaining_memory, "training.micro_batch=0 or lower, or training.gradient_checkpointing=true"
    )
    if plan.ranks > 1:
        job = RankJob(
            ranks=plan.ranks,
            device=pick_device().type,
            sharded=plan.sharded,
            checkpoint=checkpoint,
            base=None if dense is None else dense.directory,
            rows=rows,
            held_out=held_out,
            settings=settings,
            seed=run.settings.seed + phase,
            saving=saving,
            scratch=work.scratch / "ranks",
            explaining=explaining,
            **steps,
        )
        return recover_by_ranks(job, network, **state)
    with explaining():
        teacher = None if dense is None else load_teacher(dense.directory, settings, pick_device())
        torch.manual_seed(run.settings.seed + phase)
        return recover(
            network,
            read_rows(rows),
            settings,
            held_out=None if held_out is None else read_rows(held_out),
            teacher=teacher,
            save=save,
            **steps,
            **state,
        )
