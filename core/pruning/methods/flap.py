"""FLAP (arXiv 2312.11983): all groups of the model in one ranking, weighted by their parameters.

Scores are standardised within each layer and kind (criterion ``standardised_fluctuation``), which makes those
of different layers comparable: widths follow from the ranking. What went is made up for on average by biases
(repair ``bias``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.model.shape import LayerShape
from core.pruning.planning import Step, StepRequest, importance_of, sizing_for, step_to
from core.pruning.scoring.statistics import LayerScores
from core.pruning.sparsity import Sizing, sizes_near, smallest_params


def plan_step(given: StepRequest) -> Step:
    """Decide the step of a phase: the groups that score lowest in the whole model go."""
    statistics, dense, current = given.statistics, given.dense, given.current
    sizing = sizing_for(given.settings, dense, current, statistics.scores)
    layers = current.layers
    if current.num_params() > given.target_params:
        smallest_params(sizing, given.target_params)
        layers = _ranked(sizing, statistics.scores, given.target_params)
    gone = (
        1 - dense.prunable_params(now) / dense.prunable_params(whole)
        for now, whole in zip(layers, dense.layers, strict=True)
    )
    return step_to(
        statistics,
        layers,
        current=current,
        importance=importance_of(statistics),
        sparsity=tuple(gone),
    )


def _ranked(sizing: Sizing, scores: Sequence[LayerScores], target_params: int) -> tuple[LayerShape, ...]:
    """Return the sizes that are left when the lowest-scoring groups that the layers can lose have gone."""
    shape = sizing.current
    count, channel = len(shape.layers), shape.mlp_channel_params
    units = [sizing.attention_units(index) for index in range(count)]
    sizes = [_unit_params(sizing, index) for index in range(count)]
    groups = [_attention_scores(sizing, index, layer) for index, layer in enumerate(scores)]
    channels = [
        layer.mlp_channels.double().sort().values[: now.mlp_width - sizing.min_width(index)]
        for index, (layer, now) in enumerate(zip(scores, shape.layers, strict=True))
    ]
    costs = torch.cat(
        [
            torch.full((len(found),), size)
            for found, size in zip(groups + channels, sizes + [channel] * count, strict=True)
        ]
    )
    order = torch.cat(groups + channels).argsort(stable=True)
    excess = shape.num_params() - target_params
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order] = costs[order].cumsum(dim=0) <= excess
    for index, part in enumerate(gone.split(list(map(len, groups + channels)))[:count]):
        units[index] -= int(part.sum())
        excess -= int(part.sum()) * sizes[index]
    # The first group that does not fit in ends the ranking; channels alone take up the rest.
    every = torch.cat(channels)
    going = torch.zeros(len(every), dtype=torch.bool)
    going[every.argsort(stable=True)[: max(0, round(excess / channel))]] = True
    widths = [
        now.mlp_width - int(part.sum())
        for now, part in zip(shape.layers, going.split(list(map(len, channels))), strict=True)
    ]
    return sizes_near(sizing, units, widths, target_params)


def _unit_params(sizing: Sizing, index: int) -> int:
    """Return the parameters of one attention unit of a layer."""
    shape, now = sizing.current, sizing.current.layers[index]
    if sizing.cuts[index].unit == "query_head":
        return now.kv_heads * shape.query_head_params
    return shape.kv_head_params + now.heads_per_group * shape.query_head_params


def _attention_scores(sizing: Sizing, index: int, scores: LayerScores) -> Tensor:
    """Return the scores of the attention units that a layer can lose: the mean of those of its heads."""
    unit, now = sizing.cuts[index].unit, sizing.current.layers[index]
    by_group = scores.query_heads.double().view(now.kv_heads, -1)
    if unit == "query_head":
        return by_group.sort(dim=1).values.mean(dim=0)[:-1]
    return by_group.mean(dim=1).sort().values[: -1 if unit else 0]
