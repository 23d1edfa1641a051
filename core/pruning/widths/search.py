"""Widths by what they cost: a coarse-to-fine search on the divergence of the cut model from the whole one.

It starts from the paper's widths. A sweep measures each layer with some channels more, some fewer, and one
attention unit fewer, all other layers as they are. From a separable quadratic model of these costs follow a
few candidates of the exact size, each of which is measured; the best one is taken if it is better.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from core.model.shape import LayerShape, ModelShape
from core.pruning.plan import LayerPlan, select_groups
from core.pruning.planning import Step, StepRequest, plan_step, sizing_for, step_to
from core.pruning.scoring.statistics import Statistics
from core.pruning.sparsity import Sizing, sizes_near
from core.pruning.widths.divergence import CutDivergence
from core.pruning.widths.quadratic import cheapest, parabola

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SEARCH_TOKENS = 4096
"""Tokens that pass the layers for a divergence."""
MEASURED_EVERY = 4
"""Of so many of these tokens, one has its divergence measured; the others are what it follows."""
SWEEPS = 2
_PROBE = 0.1
"""Channels that a layer is measured with more and fewer, as a share of its width in the dense model."""
_REACHES = (0.6, 1.2, 2.0)
"""Bounds on a layer's change in a sweep, in probes."""
_UNITS = (0, 1 / 15, 1 / 8, 1 / 4)
"""Shares of the layers that lose an attention unit in a sweep."""
_FLATTEST = 0.05
"""Least curvature: the slope of the steepest layer changes by this share over a probe."""

Sizes = tuple[LayerShape, ...]


def measured_tokens(tokens: Tensor) -> Tensor:
    """Return the (S, T) tokens that are measured on: the last ``SEARCH_TOKENS``, in sequences."""
    return tokens[-math.ceil(SEARCH_TOKENS / tokens.shape[1]) :]


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What a sweep has measured: of each layer, or of the layers that have a unit to lose."""

    slopes: list[float]
    curvatures: list[float]
    of_units: dict[int, float]


class WidthSearch:
    """Decides a phase's step of ``prune.widths: search`` on the model that is cut."""

    def __init__(
        self, model: "PreTrainedModel", tokens: Tensor, *, batch_size: int, sweeps: int = SWEEPS
    ) -> None:
        """Let the model run once.

        Args:
            model: The phase's checkpoint. Left unchanged.
            tokens: (S, T) integer token ids that the statistics were not measured on.
            batch_size: Sequences per forward pass.
            sweeps: Most sweeps; the search ends with the first that finds nothing better.
        """
        self._divergence = CutDivergence(model, tokens, batch_size=batch_size, every=MEASURED_EVERY)
        self._sweeps = sweeps

    def step(self, given: StepRequest) -> Step:
        """Decide the step of a phase; see ``plan_step``."""
        start, statistics, current = plan_step(given), given.statistics, given.current
        if start.shape == current:
            return start
        sizing = sizing_for(given.settings, given.dense, current, statistics.scores)
        found = self._searched(statistics, sizing, start.shape.layers, given.target_params)
        return step_to(
            statistics,
            found,
            current=current,
            importance=start.importance,
            sparsity=_sparsity(sizing, current.with_layers(found)),
        )

    def _searched(self, statistics: Statistics, sizing: Sizing, best: Sizes, target_params: int) -> Sizes:
        """Return sizes that are at least as close to the whole model as ``best``."""

        def kept(index: int, after: LayerShape) -> LayerPlan:
            return select_groups(statistics.scores[index], sizing.current.layers[index], after)

        def cut(sizes: Sizes) -> list[LayerPlan]:
            return [kept(index, layer) for index, layer in enumerate(sizes)]

        (first,) = self._divergence.of([cut(best)])
        least = first
        for _ in range(self._sweeps):
            probes = list(_probes(sizing, best))
            measured = self._divergence.with_one_layer_changed(
                cut(best), [(index, kept(index, after)) for index, after in probes]
            )
            costs = _costs(sizing, best, probes, [value - least for value in measured])
            candidates = list(dict.fromkeys(_candidates(sizing, best, costs, target_params)))
            divergences = self._divergence.of([cut(sizes) for sizes in candidates])
            value, sizes = min(
                zip(divergences, candidates, strict=True), key=lambda found: found[0], default=(least, best)
            )
            if value >= least:
                break
            least, best = value, sizes
        log.info("width search: divergence %.4f nats a token, %.4f with the paper's widths", least, first)
        return best


def _probe(sizing: Sizing, index: int) -> int:
    multiple = sizing.width_multiple
    return multiple * max(1, round(_PROBE * sizing.dense.layers[index].mlp_width / multiple))


def _units(sizing: Sizing, index: int, layer: LayerShape) -> int:
    """Return the attention units of layer ``index`` at given sizes."""
    return layer.heads_per_group if sizing.cuts[index].unit == "query_head" else layer.kv_heads


def _probes(sizing: Sizing, sizes: Sizes) -> Iterator[tuple[int, LayerShape]]:
    """Yield a layer's number, and sizes of it to measure."""
    for index, (layer, now) in enumerate(zip(sizes, sizing.current.layers, strict=True)):
        width, change = layer.mlp_width, _probe(sizing, index)
        for other in (min(width + change, now.mlp_width), max(width - change, sizing.min_width(index))):
            if other != width:
                yield index, replace(layer, mlp_width=other)
        units = _units(sizing, index, layer)
        if units > sizing.units_at(index, math.inf):
            yield index, replace(sizing.with_attention_units(index, units - 1), mlp_width=width)


def _costs(
    sizing: Sizing, sizes: Sizes, probes: Sequence[tuple[int, LayerShape]], rises: Sequence[float]
) -> _Costs:
    """Fit the measured rises of the divergence."""
    points: list[list[tuple[float, float]]] = [[] for _ in sizes]
    of_units = {}
    for (index, after), rise in zip(probes, rises, strict=True):
        if change := after.mlp_width - sizes[index].mlp_width:
            points[index].append((change, rise))
        else:
            of_units[index] = rise
    slopes, curvatures = zip(*map(parabola, points), strict=True)
    steepest = max(map(abs, slopes))
    floors = [max(_FLATTEST * steepest / _probe(sizing, index), 1e-12) for index in range(len(sizes))]
    return _Costs(slopes=list(slopes), curvatures=list(map(max, curvatures, floors)), of_units=of_units)


def _candidates(sizing: Sizing, sizes: Sizes, costs: _Costs, target_params: int) -> Iterator[Sizes]:
    """Yield sizes of the exact total that the quadratic model suggests, other than ``sizes``."""
    channel = sizing.current.mlp_channel_params
    layers, now = range(len(sizes)), [layer.mlp_width for layer in sizes]
    present = [_units(sizing, index, layer) for index, layer in enumerate(sizes)]

    def params(units: Sequence[int]) -> float:
        return sizing.params(units, now)

    def fewer(indices: Sequence[int]) -> list[int]:
        return [present[index] - (index in indices) for index in layers]

    def cost(index: int) -> float:
        return costs.of_units[index] / (params(present) - params(fewer([index])))

    order = sorted(costs.of_units, key=lambda index: (cost(index), index))
    missed = abs(sizing.current.with_layers(sizes).num_params() - target_params)
    allowed = max(missed, sizing.width_multiple * channel / 2)
    for count in sorted({math.ceil(share * len(sizes)) for share in _UNITS}):
        if count > len(order):
            break
        units = fewer(order[:count])
        total = (target_params - params(units)) / channel
        for reach in _REACHES:
            bounds = [reach * _probe(sizing, index) for index in layers]
            low = [max(-bounds[i], sizing.min_width(i) - now[i]) for i in layers]
            high = [min(bounds[i], sizing.current.layers[i].mlp_width - now[i]) for i in layers]
            changes = cheapest(costs.slopes, costs.curvatures, low, high, total)
            widths = [width + change for width, change in zip(now, changes, strict=True)]
            found = sizes_near(sizing, units, widths, target_params)
            off = abs(sizing.current.with_layers(found).num_params() - target_params)
            if off <= allowed and found != sizes:
                yield found


def _sparsity(sizing: Sizing, after: ModelShape) -> tuple[float, ...]:
    """Return the cumulative sparsity that sizes amount to, as ``Sizing.width_at`` reads it."""
    if sizing.by_budget:
        return tuple(
            1 - sizing.prunable(after, index) / sizing.prunable(sizing.dense, index)
            for index in range(len(after.layers))
        )
    return tuple(
        1 - layer.mlp_width / whole.mlp_width
        for layer, whole in zip(after.layers, sizing.dense.layers, strict=True)
    )
