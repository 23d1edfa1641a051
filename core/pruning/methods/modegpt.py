"""MoDeGPT (arXiv 2408.09632), its part for MLPs: Nystroem approximation, and widths by layer importance.

Channels stay by their ridge leverage scores (criterion ``leverage``); down_proj then becomes the
least-squares fit of what it computed (repair ``ridge_to_zero``), which is the paper's Nystroem form.
Attention stays whole: the paper's decompositions of query and key (CR) and of value and output (SVD) are not
built.
"""

import math
from collections.abc import Sequence

from core.model.shape import ModelShape
from core.pruning.planning import Step, importance_of, sizing_for, step_to
from core.pruning.scoring.statistics import Statistics
from core.pruning.sparsity import MAX_SPARSITY, sizes_for_target
from core.settings.prune import PruneSettings

TEMPERATURE = 0.1
"""Epsilon of the paper's allocation. Towards infinity all layers lose the same share."""


def shares(similarities: Sequence[float], mean: float, temperature: float = TEMPERATURE) -> tuple[float, ...]:
    """Return the share of each layer that goes: L * mean * softmax(-s / temperature).

    It maximises sum s_i (1 - share_i) plus the temperature times the entropy of the shares.

    Args:
        similarities: Cosine similarity of each layer's input and output; its importance s is 1 less that.
        mean: Mean share over the layers.
        temperature: Epsilon.
    """
    largest = max(similarities)
    weights = [math.exp((similarity - largest) / temperature) for similarity in similarities]
    return tuple(len(weights) * mean * weight / math.fsum(weights) for weight in weights)


def plan_step(
    statistics: Statistics,
    *,
    dense: ModelShape,
    current: ModelShape,
    sparsity: Sequence[float],
    target_params: int,
    steps_left: int,
    settings: PruneSettings,
) -> Step:
    """Decide the step of a phase: widths by importance, channels by leverage."""
    sizing, importance = sizing_for(settings, dense, current), importance_of(statistics)
    widths = [layer.mlp_width for layer in current.layers]
    excess = max(current.num_params() - target_params, 0)
    going = shares(statistics.similarities.tolist(), excess / (sum(widths) * current.mlp_channel_params))
    after = [
        1 - width / whole.mlp_width * (1 - share)
        for width, whole, share in zip(widths, dense.layers, going, strict=True)
    ]
    layers, shift = sizes_for_target(sizing, after, importance, target_params)
    return step_to(
        statistics,
        layers,
        current=current,
        importance=importance,
        sparsity=tuple(min(max(s + shift, 0.0), MAX_SPARSITY) for s in after),
    )
