"""The step that opens a run: resolve-base."""

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from core.errors import SettingsError, TargetError, UnsupportedModelError, refuse
from core.evaluation.task_data import unknown_tasks
from core.runs.run import Run
from core.scratch import scratch_folder
from core.settings.parameters import settings_of_run
from core.settings.schema import Settings
from core.steps.closing import close_dead_runs
from core.steps.frame import tracker_of
from core.steps.opening import open_run
from core.storage.layout import pointer_of
from core.storage.publication import open_publication
from core.storage.store import open_store
from core.tracking.mlflow import STORE
from core.tracking.presentation import data_sets, short_base, summary_params

if TYPE_CHECKING:
    from core.model.checkpoint import Checkpoint
    from core.model.shape import ModelShape
    from core.pruning.sparsity import Sizing

log = logging.getLogger(__name__)


def run_resolve_base(
    *,
    base_model: str,
    revision: str,
    target: str,
    method: str,
    recipe: Mapping[str, Any],
    fixed: Mapping[str, Mapping[str, Any]],
    job: str,
    accelerated: Collection[str] = (),
) -> tuple[dict[str, str], str, str]:
    """Pin the revisions of the base model and of hub data sets, plan the sizes of all phases, open the run.

    Args:
        base_model: ``model.base``.
        revision: ``model.revision``.
        target: ``prune.target``.
        method: ``prune.method``.
        recipe: All other settings.
        fixed: Settings that the pipeline was compiled for, by section; N_P is one.
        job: Identifies this execution; finalize finds the run by it.
        accelerated: Sections whose tasks get accelerators, which this machine may not have.

    Returns:
        The handle that later steps load the run by, the URI of the base model's publication, and which other
        execution works on the run; "" if none does.

    Raises:
        SettingsError: If a setting is wrong.
        CheckpointError: If there is no such base model.
        UnsupportedModelError: If its family is not supported, or does not lose what the settings ask for.
        TargetError: If the target cannot be reached.
        LeaseError: If another execution works on the run, and this one is a local run.
    """
    from core.bases.importing import import_base
    from core.model.checkpoint import Checkpoint
    from core.runs.revisions import settle_revisions
    from core.steps.settled import settle_precision

    own = {"base_model": base_model, "revision": revision, "target": target, "method": method}
    settings = settings_of_run({**own, "recipe": recipe}, fixed)
    refuse(unknown_tasks(settings.evaluation))  # else the first evaluation would find out
    base_uri, commit = import_base(settings.model, settings.storage.store, tracking_uri=settings.tracking.uri)
    with scratch_folder() as scratch:
        base = Checkpoint(open_publication(base_uri).fetch(scratch, only=["config.json"]))
    dense, phase_params = _sizes_of_phases(settings, base)
    settings, chosen = settle_precision(settings, commit, accelerated=accelerated)
    settings = settle_revisions(settings, commit)
    run = Run(
        store=settings.storage.store,
        key=Run.key_of(commit, settings),
        settings=settings,
        revision=commit,
        base_uri=base_uri,
        dense=dense,
        phase_params=phase_params,
        job=job,
        chosen=chosen,
    )
    if other := open_run(run):
        log.info("run %s is being done by %s", run.key, other)
        return run.handle(), base_uri, other
    open_store(run.store).write_bytes(pointer_of(job), run.pointer())
    sizes = [f"{params:,}" for params in (dense.num_params(), phase_params[-1])]
    log.info("run %s: %s, %s to %s parameters", run.key, base_model, *sizes)
    if not run.is_complete():
        _start_tracking(run)
    return run.handle(), base_uri, ""


def _start_tracking(run: Run) -> None:
    """Open the run's page in MLflow, and close those of runs in this store that have died."""
    settings, store, tracker = run.settings, open_store(run.store), tracker_of(run)
    tags = {"adapt_pruner.base": settings.model.base, "adapt_pruner.revision": run.revision}
    tags |= {f"adapt_pruner.precision.{section}": text for section, text in run.chosen.items()}
    params = {**summary_params(settings), **settings.to_dict()}
    tracker.start(params, {**tags, STORE: store.uri}, data_sets(settings))
    tracker.describe(
        f"{short_base(settings.model.base)}, {run.dense.num_params():,} parameters, to "
        f"{run.phase_params[-1]:,} in {len(run.phase_params)} phases by {settings.prune.method}. "
        f"Run `{run.key}` in `{store.uri}`."
    )
    for closed in close_dead_runs(tracker, store, sparing=run.key):
        log.info("closed in MLflow: %s", closed)


def _sizes_of_phases(settings: Settings, base: "Checkpoint") -> tuple["ModelShape", tuple[int, ...]]:
    """Return the sizes of the base model, and the parameters that each phase is to end at."""
    from core.export.decilm import decilm_obstacle
    from core.model.build import model_shape
    from core.model.config import moving_frequencies_from, refuse_sliced
    from core.pruning.methods.minitron import narrowed_config
    from core.pruning.methods.shortgpt import fewest_layers
    from core.pruning.methods.slicegpt import sliced_config
    from core.pruning.phases import phase_sizes
    from core.pruning.planning import settings_for, shape_under, sizing_for
    from core.pruning.sparsity import smallest_params

    refuse_sliced(base.config)
    obstacle = decilm_obstacle(base.config) if settings.prune.profile == "portable" else None
    if obstacle is not None:
        raise UnsupportedModelError(
            f"prune.profile=portable needs a base model that the DeciLM format holds, but {obstacle}. Set "
            "prune.profile to free, or choose another base model."
        )
    dense, prune = model_shape(base.config), settings_for(settings.prune, base.family)
    base_params = dense.num_params()
    beyond = [layer for layer in settings.training.hidden_layers if layer >= len(dense.layers)]
    if beyond:
        raise SettingsError(
            [
                f"training.hidden_layers={beyond[0]}: the base model has {len(dense.layers)} layers, from 0 "
                "on. Name others."
            ]
        )
    moving, training = moving_frequencies_from(base.config), settings.training
    if training.total_steps and training.packing == "whole" and moving and training.sequence_length > moving:
        raise SettingsError(
            [
                f"training.sequence_length={training.sequence_length}: above {moving} tokens the rotary "
                f"frequencies of {settings.model.base} depend on the longest document beside, so those of "
                f"packed documents would change each other. Set at most {moving}, or training.packing=cut."
            ]
        )
    target_params = prune.target_params(base_params)
    if target_params >= base_params:
        raise TargetError(
            f"prune.target={prune.target} is not below the {base_params:,} parameters of "
            f"{settings.model.base}. Lower it."
        )
    if prune.method == "slicegpt":
        config = sliced_config(base.config, target_params)
        log.info("the signal between layers is sliced to %d columns", config.sliced_hidden_size)
        return dense, (target_params,)
    config = base.config
    if prune.narrows:
        config = narrowed_config(config, prune, target_params)
        log.info("%d of %d embedding channels stay", config.hidden_size, base.config.hidden_size)
    whole = shape_under(prune, model_shape(config), config)
    least = whole.with_layers(whole.layers[: fewest_layers(prune, whole, target_params)])
    sizing = sizing_for(prune, least, least)
    smallest_params(sizing, target_params)
    if prune.profile == "portable":
        _announce_size(sizing, prune.target, target_params)
    return dense, phase_sizes(base_params, target_params, prune.phases, prune.phase_sizes)


def _announce_size(sizing: "Sizing", target: str, target_params: int) -> None:
    """Log the size nearest to the target that widths of the portable profile reach; refuse the base's own."""
    from core.pruning.sparsity import sizes_for_target

    alike = (0.0,) * len(sizing.dense.layers)
    layers, _ = sizes_for_target(sizing, alike, alike, target_params)
    nearest, base = sizing.dense.with_layers(layers).num_params(), sizing.dense.num_params()
    step = sizing.width_multiple * sizing.dense.mlp_channel_params
    widths = f"MLP widths that are multiples of {sizing.width_multiple} change it by {step:,} at a time"
    if nearest == base:
        raise TargetError(
            f"prune.target={target}: the nearest size is the base model's, {base:,} parameters, since "
            f"{widths}. Lower prune.target."
        )
    log.info("the nearest size to the target is %s parameters: %s", f"{nearest:,}", widths)
