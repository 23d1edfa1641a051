"""The step that opens a run: resolve-base."""

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from core.errors import TargetError, UnsupportedModelError
from core.runs.run import Run
from core.scratch import scratch_folder
from core.settings.methods import WHOLE_LAYERS
from core.settings.parameters import settings_of_run
from core.settings.schema import Settings
from core.steps.frame import tracker_of
from core.steps.opening import open_run
from core.storage.layout import pointer_of
from core.storage.publication import open_publication
from core.storage.store import open_store

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
    from core.steps.revisions import settle_revisions
    from core.steps.settled import settle_precision

    own = {"base_model": base_model, "revision": revision, "target": target, "method": method}
    settings = settings_of_run({**own, "recipe": recipe}, fixed)
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
        tags = {"adapt_pruner.base": base_model, "adapt_pruner.revision": commit}
        tags |= {f"adapt_pruner.precision.{section}": text for section, text in chosen.items()}
        tracker_of(run).start(settings.to_dict(), tags)
    return run.handle(), base_uri, ""


def _sizes_of_phases(settings: Settings, base: "Checkpoint") -> tuple["ModelShape", tuple[int, ...]]:
    """Return the sizes of the base model, and the parameters that each phase is to end at."""
    from core.export.decilm import decilm_obstacle
    from core.model.build import model_shape
    from core.model.config import refuse_sliced
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
    whole = shape_under(prune, dense, base.config)
    least = whole.with_layers(whole.layers[:1]) if prune.method in WHOLE_LAYERS else whole
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
