"""Adapt-Pruner's decisions: from statistics to kept groups and cumulative sparsity (Algorithm 1)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core.errors import UnsupportedModelError
from core.model.build import model_shape
from core.model.config import with_output_biases
from core.model.families import Family
from core.model.shape import LayerShape, ModelShape
from core.pruning.attention import AttentionCut, attention_cuts
from core.pruning.methods.llm_pruner import whole_layers
from core.pruning.phases import pruning_steps
from core.pruning.plan import LayerPlan, Plan, select_groups
from core.pruning.scoring.criteria import CRITERIA
from core.pruning.scoring.statistics import LayerScores, Statistics
from core.pruning.sparsity import (
    MAX_SPARSITY,
    Sizing,
    next_sparsity,
    sizes_at,
    sizes_for_target,
)
from core.pruning.widths.importance import layer_importance, sparsity_by_shares
from core.settings.methods import ATTENTION
from core.settings.prune import PORTABLE_WIDTH, AttentionUnit, PruneSettings, WidthRule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The decisions of one pruning step.

    Attributes:
        layers: What each layer keeps.
        shape: Sizes of the remaining model.
        importance: Normalised importance of each layer of the dense model; 0 for those that went before.
        sparsity: Cumulative sparsity of each layer of the dense model after the step; 1 for those gone whole.
    """

    layers: tuple[LayerPlan, ...]
    shape: ModelShape
    importance: tuple[float, ...]
    sparsity: tuple[float, ...]


def settings_for(settings: PruneSettings, family: Family) -> PruneSettings:
    """Return the settings as they apply to a family.

    The method has its own. The portable profile means whole attention and MLP widths that are multiples of
    256. ``auto`` leaves attention whole if the family's heads cannot be removed. It compares scores of
    attention and MLP, so it means ``kv_group`` under a criterion whose scores do not estimate the loss, and
    under methods that do not compare them.

    Raises:
        UnsupportedModelError: If the settings ask to remove heads that cannot be removed.
    """
    settings = settings.applied()
    if settings.profile == "portable":
        multiple = max(settings.width_multiple, PORTABLE_WIDTH)
        return replace(settings, attention_unit="none", width_multiple=multiple)
    if settings.attention_unit == "auto":
        comparable = settings.method == "adapt-pruner" and CRITERIA[settings.criterion].of_loss
        unit: AttentionUnit = "auto" if comparable else ATTENTION.get(settings.method, "kv_group")
        return replace(settings, attention_unit=unit if family.prunes_heads else "none")
    if family.prunes_heads or settings.attention_unit == "none":
        return settings
    raise UnsupportedModelError(
        f"prune.attention_unit={settings.attention_unit}: {family.model_type} normalises queries and keys "
        "over all heads at once, so removing one changes the others. Set prune.attention_unit to "
        "auto or none."
    )


def sizing_for(
    settings: PruneSettings,
    dense: ModelShape,
    current: ModelShape,
    scores: Sequence[LayerScores] | None = None,
) -> Sizing:
    """Return the rules that turn sparsities into sizes under the settings of a run.

    Without ``scores`` of the groups, the rules allow every size that some scores could lead to.
    """
    cuts = attention_cuts(settings.attention_unit, dense, current, scores)
    whole = whole_layers(len(cuts)) if settings.method == "llm-pruner" else frozenset[int]()
    return Sizing(
        dense=dense,
        current=current,
        cuts=tuple(AttentionCut(unit=None) if i in whole else cut for i, cut in enumerate(cuts)),
        by_budget=settings.attention_unit == "auto",
        width_multiple=settings.width_multiple,
        whole=whole,
    )


def shape_under(settings: PruneSettings, shape: ModelShape, config: "PreTrainedConfig") -> ModelShape:
    """Return the sizes of a model with the parameters that the repair adds to its layers, cut or not.

    Args:
        settings: Of the run, as they apply.
        shape: Sizes of the model.
        config: Of the model, of any layer sizes.
    """
    if settings.repair != "bias":
        return shape
    return replace(shape, layer_params=model_shape(with_output_biases(config)).layer_params)


@dataclass(frozen=True, kw_only=True)
class StepRequest:
    """What a pruning step is decided from.

    Attributes:
        statistics: Measured on the model as pruned so far.
        dense: Sizes at the start of the run.
        current: Sizes now.
        sparsity: Cumulative sparsity of each layer so far.
        target_params: Where the phase ends.
        steps_left: Steps left in the phase, including this one; the last one lands on the target, as does an
            earlier one that would cross it.
        settings: How the sparsity is spread, attention unit and width multiple.
    """

    statistics: Statistics
    dense: ModelShape
    current: ModelShape
    sparsity: Sequence[float]
    target_params: int
    steps_left: int
    settings: PruneSettings


DecideStep = Callable[[StepRequest], Step]
"""Decides one pruning step, by the rules of a method.

Raises:
    TargetError: If the target cannot be reached.
"""


def plan_step(given: StepRequest) -> Step:
    """Decide one pruning step on the way to a phase's target, as ``DecideStep``."""
    statistics, settings = given.statistics, given.settings
    current, sparsity, target_params = given.current, given.sparsity, given.target_params
    sizing = sizing_for(settings, given.dense, current, statistics.scores)
    importance = importance_of(statistics, settings.widths)
    to_remove = max(current.num_params() - target_params, 0) / given.steps_left
    added = to_remove / sizing.prunable_params()
    if settings.widths == "softmax":
        after = sparsity_by_shares(sizing, statistics.similarities.tolist(), to_remove)
    else:
        after = next_sparsity(
            sparsity, importance, step=added, amplitude=settings.amplitude, per=settings.amplitude_per
        )
    layers = sizes_at(sizing, after)
    if given.steps_left == 1 or current.with_layers(layers).num_params() <= target_params:
        layers, shift = sizes_for_target(sizing, after, importance, target_params)
        # Widths that were rounded down lower the shift, but not below the sparsity before this step.
        shift = max(shift, -added)
        after = tuple(min(max(s + shift, 0.0), MAX_SPARSITY) for s in after)
    after = tuple(0.0 if i in sizing.whole else s for i, s in enumerate(after))
    return step_to(statistics, layers, current=current, importance=importance, sparsity=after)


def step_to(
    statistics: Statistics,
    layers: tuple[LayerShape, ...],
    *,
    current: ModelShape,
    importance: tuple[float, ...],
    sparsity: tuple[float, ...],
) -> Step:
    """Return the step to the layer sizes ``layers``; in each layer the lowest-scoring groups go."""
    plans = tuple(
        select_groups(scores, now, wanted)
        for scores, now, wanted in zip(statistics.scores, current.layers, layers, strict=True)
    )
    return Step(layers=plans, shape=current.with_layers(layers), importance=importance, sparsity=sparsity)


def importance_of(statistics: Statistics, rule: WidthRule = "similarity") -> tuple[float, ...]:
    """Return each layer's importance in [-1, 1]; see ``layer_importance``."""
    return layer_importance(statistics.similarities.tolist(), rule)


def plan_phase(
    statistics: Statistics,
    *,
    dense: ModelShape,
    current: ModelShape,
    sparsity: Sequence[float],
    target_params: int,
    settings: PruneSettings,
    checkpoint: str,
    statistics_digest: str,
    remeasure: Callable[[tuple[LayerPlan, ...], int], Statistics],
    decide: DecideStep = plan_step,
) -> Plan:
    """Decide all pruning steps of a phase and compose them into one plan.

    Args:
        statistics: Measured on the checkpoint.
        dense: Sizes at the start of the run.
        current: Sizes of the checkpoint.
        sparsity: Cumulative sparsity of each layer before the phase.
        target_params: Where the phase ends.
        settings: Steps, amplitude, attention unit and width multiple.
        checkpoint: Digest of the checkpoint.
        statistics_digest: Digest of the statistics.
        remeasure: Takes what the last step keeps of the model before it, and the next step's number (from 1);
            returns statistics of the remaining model.
        decide: Decides each step.

    Raises:
        TargetError: If the target cannot be reached.
    """
    plan: Plan | None = None
    step: Step | None = None
    steps = pruning_steps(current.num_params(), target_params, settings.steps_per_phase)
    for number in range(steps):
        if number and current.num_params() <= target_params:
            break
        if step is not None:
            statistics = remeasure(step.layers, number)
        step = decide(
            StepRequest(
                statistics=statistics,
                dense=dense,
                current=current,
                sparsity=sparsity,
                target_params=target_params,
                steps_left=steps - number,
                settings=settings,
            )
        )
        decided = Plan(
            layers=step.layers,
            before=current.layers,
            checkpoint=checkpoint,
            statistics=statistics_digest,
            importance=step.importance,
            sparsity=step.sparsity,
            params_before=current.num_params(),
            params_after=step.shape.num_params(),
            target_params=target_params,
        )
        plan = decided if plan is None else plan.then(decided)
        current, sparsity = step.shape, step.sparsity
    assert plan is not None, "a phase has at least one step"
    missed = abs(plan.params_after - target_params)
    # SliceGPT removes columns of the whole model, eight at a time.
    if settings.method != "slicegpt" and missed > settings.width_multiple * dense.mlp_channel_params / 2:
        log.warning(
            "the phase ends at %s parameters, %s from its target, which is more than half of %d MLP channels "
            "(prune.width_multiple): a unit of attention has more than what the MLPs have left. Take another "
            "prune.target, or prune.attention_unit=none, if that is too far.",
            f"{plan.params_after:,}",
            f"{missed:,}",
            settings.width_multiple,
        )
    return plan
