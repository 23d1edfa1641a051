"""When attention is cut: as much as the MLP, or where it scores lower than the MLP's channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from core.model.shape import LayerShape, ModelShape
from core.pruning.scoring.statistics import LayerScores
from core.settings.prune import AttentionUnit


@dataclass(frozen=True, kw_only=True)
class AttentionCut:
    """How the attention of one layer is cut.

    Attributes:
        unit: A KV head with its query heads, or one query head of every KV head; None if it stays whole.
        due: Sparsities of the layer at which the next units are removed, ascending; the last unit stays.
    """

    unit: Literal["kv_group", "query_head"] | None = "kv_group"
    due: tuple[float, ...] = ()


def attention_cuts(
    unit: AttentionUnit, dense: ModelShape, current: ModelShape, scores: Sequence[LayerScores] | None = None
) -> tuple[AttentionCut, ...]:
    """Return how each layer's attention is cut under a setting.

    Args:
        unit: The setting.
        dense: Sizes at the start of the run.
        current: Sizes now.
        scores: Scores of each layer's groups; without them, ``auto`` allows every cut.
    """
    if unit == "none":
        return (AttentionCut(unit=None),) * len(dense.layers)
    if unit == "auto" and scores is not None:
        return cuts_by_score(dense, current, scores)
    return equal_cuts(dense, current, "kv_group" if unit == "auto" else unit)


def equal_cuts(
    dense: ModelShape, current: ModelShape, unit: Literal["kv_group", "query_head"]
) -> tuple[AttentionCut, ...]:
    """Cut the same share of attention units as of MLP channels (section 3.1).

    A query head that shares its KV head with no other goes with it.
    """

    def cut(whole: LayerShape, now: LayerShape) -> AttentionCut:
        if unit == "query_head" and whole.heads_per_group > 1:
            return AttentionCut(unit=unit, due=due(whole.heads_per_group, now.heads_per_group))
        return AttentionCut(due=due(whole.kv_heads, now.kv_heads))

    def due(count: int, left: int) -> tuple[float, ...]:
        return tuple(gone / count for gone in range(count - left + 1, count))

    return tuple(map(cut, dense.layers, current.layers))


def cuts_by_score(
    dense: ModelShape, current: ModelShape, scores: Sequence[LayerScores]
) -> tuple[AttentionCut, ...]:
    """Cut a KV group when it scores lower per parameter than the MLP channels it would replace.

    Returns:
        For ``Sizing(by_budget=True)``.
    """
    cuts = []
    channel = current.mlp_channel_params
    for whole, now, layer in zip(dense.layers, current.layers, scores, strict=True):
        group = current.kv_head_params + now.heads_per_group * current.query_head_params
        lost = dense.prunable_params(whole) - dense.prunable_params(now)
        channels = (layer.mlp_channels.double() / channel).sort().values
        groups = layer.kv_groups.double().sort().values[:-1] / group
        cheaper = torch.searchsorted(channels, groups).clamp_max(now.mlp_width - 1).tolist()
        budgets = [lost + count * channel + (gone + 1) * group for gone, count in enumerate(cheaper)]
        cuts.append(AttentionCut(due=tuple(budget / dense.prunable_params(whole) for budget in budgets)))
    return tuple(cuts)
