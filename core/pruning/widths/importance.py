"""Layer importance from similarities, by the rules of ``prune.widths`` that need nothing else."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from core.pruning.sparsity import Sizing, normalise_importance
from core.settings.prune import WidthRule

TEMPERATURE = 0.1
"""Epsilon of MoDeGPT's allocation. Towards infinity all layers lose the same share."""
CLIP = 2.0
"""Largest deviation from the median that ``clipped`` leaves, in median absolute deviations."""


def layer_importance(similarities: Sequence[float], rule: WidthRule = "similarity") -> tuple[float, ...]:
    """Return each layer's importance in [-1, 1]: one that leaves its input alone matters least (eq. 4-5).

    Args:
        similarities: Of each layer's input and output.
        rule: ``ranks`` and ``clipped`` let no single layer set the scale; all others are the paper's.
    """
    importance = normalise_importance([-s for s in similarities])
    if rule == "ranks":
        return normalise_importance(ranks(importance).tolist())
    if rule == "clipped":
        return normalise_importance(_clipped(importance))
    return importance


def ranks(values: Sequence[float]) -> Tensor:
    """Return (L,) float64 ranks; equal values share the mean of theirs."""
    x = torch.tensor(values, dtype=torch.float64)
    below, equal = (x[:, None] > x).sum(dim=1), (x[:, None] == x).sum(dim=1)
    return below.double() + (equal.double() - 1) / 2


def _clipped(values: Sequence[float]) -> list[float]:
    """Clip deviations from the median; of layers that are mostly alike, none are."""
    median = statistics.median(values)
    most = CLIP * statistics.median(abs(value - median) for value in values)
    return [min(max(value, median - most), median + most) for value in values] if most else list(values)


def shares(similarities: Sequence[float], mean: float, temperature: float = TEMPERATURE) -> tuple[float, ...]:
    """Return the share of each layer that goes: L * mean * softmax(-s / temperature).

    It is the allocation of MoDeGPT (arXiv 2408.09632): it maximises sum s_i (1 - share_i) plus the
    temperature times the entropy of the shares.

    Args:
        similarities: Cosine similarity of each layer's input and output; its importance s is 1 less that.
        mean: Mean share over the layers.
        temperature: Epsilon.
    """
    largest = max(similarities)
    weights = [math.exp((similarity - largest) / temperature) for similarity in similarities]
    return tuple(len(weights) * mean * weight / math.fsum(weights) for weight in weights)


def sparsity_by_shares(sizing: Sizing, similarities: Sequence[float], to_remove: float) -> tuple[float, ...]:
    """Return the cumulative sparsity of each layer after a step that removes ``shares`` of what it has.

    Args:
        sizing: Present sizes and the rules.
        similarities: Of each layer's input and output.
        to_remove: Parameters that the step removes.
    """
    layers = range(len(similarities))
    now, whole = ([sizing.prunable(model, i) for i in layers] for model in (sizing.current, sizing.dense))
    going = shares(similarities, to_remove / sum(now))
    return tuple(1 - n / w * (1 - share) for n, w, share in zip(now, whole, going, strict=True))
