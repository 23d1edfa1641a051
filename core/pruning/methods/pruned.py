"""A phase without files: a model in memory planned, cut and repaired as score-layers and prune-step do it."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from core.model.build import model_of, model_shape
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel
from core.pruning.methods.method import decision_of
from core.pruning.methods.opened import OpenedModel, Parts
from core.pruning.plan import LayerPlan
from core.pruning.planning import plan_phase, settings_for, shape_under
from core.pruning.repair import Repair
from core.pruning.scoring.statistics import Statistics
from core.pruning.surgery import prune_model
from core.settings.prune import PruneSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MICRO_BATCH = 8


def pruned_model(
    model: "PreTrainedModel",
    statistics: Statistics,
    *,
    settings: PruneSettings,
    target_params: int,
    remeasure: Callable[["PreTrainedModel", int], Statistics],
    tokens: Tensor,
    keep_bytes: int = 0,
    seed: int = 0,
) -> "PreTrainedModel":
    """Return what a method leaves of a model in one phase.

    Args:
        model: The dense model. Left unchanged; the result may share tensors with it.
        statistics: Measured on it, with ``settings.applied()``'s criterion and similarity.
        settings: Method, steps, repair and all else of the section ``prune``; its target does not count.
        target_params: Parameters that stay.
        remeasure: Takes what is left between two steps, and the next step's number (from 1); returns its
            statistics.
        tokens: (S, T) int64 token ids that the repair is computed from, and whatever else a method needs.
        keep_bytes: See ``Repair``.
        seed: Of the masks of ``sheared-llama``.

    Raises:
        TargetError: If the target cannot be reached.
    """
    settings = settings_for(settings, family_of(model.config))
    dense = shape_under(settings, model_shape(model.config), model.config)
    left, whole = [model], [model]

    def remake(config: "PreTrainedConfig", parts: Parts) -> None:
        tensors = {name: tensor.to(model.dtype) for part in parts for name, tensor in part.items()}
        whole[0] = model_of(config, tensors, dtype=model.dtype, device=model.device)

    def opened() -> OpenedModel:
        return OpenedModel(
            model=LayerwiseModel(copy.deepcopy(model)),
            tokens=tokens,
            micro_batch=_MICRO_BATCH,
            autocast=False,
            seed=seed,
            remake=remake,
        )

    def cut(layers: tuple[LayerPlan, ...], step: int) -> Statistics:
        left[0] = prune_model(left[0], layers)
        return remeasure(left[0], step)

    plan = plan_phase(
        statistics,
        dense=dense,
        current=dense,
        sparsity=(0.0,) * len(dense.layers),
        target_params=target_params,
        settings=settings,
        checkpoint="",
        statistics_digest="",
        remeasure=cut,
        decide=decision_of(settings, opened),
    )
    return repaired_model(whole[0], plan.layers, settings=settings, tokens=tokens, keep_bytes=keep_bytes)


def repaired_model(
    model: "PreTrainedModel",
    layers: tuple[LayerPlan, ...],
    *,
    settings: PruneSettings,
    tokens: Tensor,
    keep_bytes: int = 0,
) -> "PreTrainedModel":
    """Return what ``layers`` leave of a model, repaired as ``settings``, which are as they apply, ask for.

    ``model`` is left unchanged; ``tokens`` and ``keep_bytes`` are as in ``pruned_model``.
    """
    if settings.repair == "none":
        return prune_model(model, layers)
    weights = {parameter: parameter.data for parameter in model.parameters()}
    repair = Repair(
        LayerwiseModel(model),
        tokens,
        kind=settings.repair,
        ridge=settings.ridge,
        keep_bytes=keep_bytes,
    )
    try:
        changes = [repair.layer(index, plan) for index, plan in enumerate(layers)]
    finally:
        for parameter, weight in weights.items():
            parameter.data = weight
    smaller = prune_model(model, layers, biased=repair.kind == "bias")
    prefix = family_of(model.config).layers
    for index, changed in enumerate(changes):
        for name, change in changed.items():
            parameter = smaller.get_parameter(f"{prefix}.{index}.{name}")
            parameter.data = (parameter + change.to(parameter.device)).to(parameter.dtype).detach()
    return smaller
