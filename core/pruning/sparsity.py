"""Importance, adaptive cumulative sparsity, and the sizes that reach a target exactly (eq. 3-6)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from core.errors import TargetError
from core.model.shape import LayerShape, ModelShape
from core.pruning.attention import AttentionCut

MAX_SPARSITY = 0.99
REFERENCE_STEP = 0.02
"""The step for which an amplitude per share is given: that of the published scripts."""


def normalise_importance(importance: Sequence[float]) -> tuple[float, ...]:
    """Centre layer importances and scale the largest deviation to 1 (section 3.1, after eq. 5).

    Args:
        importance: One value per layer, larger for layers that change their input more.

    Returns:
        Values in [-1, 1] with mean 0; all 0 if the layers are equal.
    """
    mean = math.fsum(importance) / len(importance)
    centred = [value - mean for value in importance]
    largest = max(map(abs, centred))
    # Layers that differ only by rounding are equal: scaling would turn noise into sparsity.
    if largest <= 1e-12 * max(1.0, abs(mean)):
        return (0.0,) * len(importance)
    return tuple(value / largest for value in centred)


def next_sparsity(
    sparsity: Sequence[float],
    importance: Sequence[float],
    *,
    step: float,
    amplitude: float,
    per: Literal["share", "step"] = "share",
) -> tuple[float, ...]:
    """Accumulate one pruning step: s(t) = clamp(s(t-1) + dS - A(dS) * I, 0, 0.99) (eq. 6, Algorithm 1).

    Args:
        sparsity: s(t-1), each layer's removed share of its prunable width at the start.
        importance: I(t), normalised to [-1, 1].
        step: dS, the mean sparsity that the step adds; 0 changes nothing.
        amplitude: A.
        per: ``step``: A(dS) = A, as in the paper. ``share``: A(dS) = A * dS / 2 %, so that one step equals
            several smaller ones.
    """
    if step <= 0:
        return tuple(sparsity)
    spread = amplitude if per == "step" else amplitude * step / REFERENCE_STEP
    return tuple(
        min(max(s + step - spread * i, 0.0), MAX_SPARSITY) for s, i in zip(sparsity, importance, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The rules that turn sparsities into sizes.

    Attributes:
        dense: Sizes at the start of the run: sparsity is a share of these.
        current: Sizes now; nothing grows back beyond them.
        cuts: How each layer's attention is cut.
        by_budget: Whether a layer's sparsity is a share of all its prunable parameters, so that its MLP gets
            what its attention leaves; otherwise it is a share of each kind of group separately.
        width_multiple: MLP widths are multiples of this, except widths that are not cut.
        whole: Layers that lose nothing.
    """

    dense: ModelShape
    current: ModelShape
    cuts: tuple[AttentionCut, ...]
    by_budget: bool = False
    width_multiple: int = 1
    whole: frozenset[int] = frozenset()

    def attention_units(self, index: int) -> int:
        """Return the attention units of layer ``index``."""
        layer = self.current.layers[index]
        return layer.heads_per_group if self.cuts[index].unit == "query_head" else layer.kv_heads

    def with_attention_units(self, index: int, units: int) -> LayerShape:
        """Return layer ``index`` with ``units`` attention units."""
        layer = self.current.layers[index]
        if self.cuts[index].unit == "query_head":
            return replace(layer, query_heads=layer.kv_heads * units)
        return replace(layer, kv_heads=units, query_heads=units * layer.heads_per_group)

    def min_width(self, index: int) -> int:
        """Return the smallest MLP width of layer ``index``."""
        if index in self.whole:
            return self.current.layers[index].mlp_width
        return min(max(1, self.width_multiple), self.current.layers[index].mlp_width)

    def units_at(self, index: int, sparsity: float) -> int:
        """Return the attention units that layer ``index`` keeps, at least one."""
        gone = sum(due <= sparsity + 1e-9 for due in self.cuts[index].due)
        return self.attention_units(index) - gone

    def width_at(self, index: int, sparsity: float, units: int) -> float:
        """Return the MLP width of layer ``index`` beside ``units`` attention units, before rounding."""
        kept = 1 - min(max(sparsity, 0.0), 1.0)
        if self.by_budget:
            attention = self.current.attention_params(self.with_attention_units(index, units))
            budget = self.dense.prunable_params(self.dense.layers[index]) * kept - attention
            width = budget / self.dense.mlp_channel_params
        else:
            width = self.dense.layers[index].mlp_width * kept
        return min(float(self.current.layers[index].mlp_width), max(float(self.min_width(index)), width))

    def layers(self, units: Sequence[int], widths: Sequence[int]) -> tuple[LayerShape, ...]:
        """Return layer shapes of the given sizes."""
        return tuple(
            replace(self.with_attention_units(i, units[i]), mlp_width=width) for i, width in enumerate(widths)
        )

    def params(self, units: Sequence[int], widths: Sequence[float]) -> float:
        """Return the model's parameters at the given attention units and (fractional) MLP widths."""
        bare = self.layers(units, [0] * len(widths))
        return self.current.with_layers(bare).num_params() + self.current.mlp_channel_params * math.fsum(
            widths
        )

    def prunable(self, model: ModelShape, index: int) -> int:
        """Return the parameters of layer ``index`` of a model that the rules allow to remove."""
        if index in self.whole:
            return 0
        layer = model.layers[index]
        attention = model.attention_params(layer) if self.cuts[index].unit is None else 0
        return model.prunable_params(layer) - attention

    def prunable_params(self) -> int:
        """Return the parameters of the dense model that sparsity is a share of."""
        return sum(self.prunable(self.dense, index) for index in range(len(self.cuts)))


def sizes_at(sizing: Sizing, sparsity: Sequence[float]) -> tuple[LayerShape, ...]:
    """Return the layer sizes at given sparsities, without a target."""
    units = [sizing.units_at(i, s) for i, s in enumerate(sparsity)]
    widths = []
    for i, s in enumerate(sparsity):
        now, multiple = sizing.current.layers[i].mlp_width, sizing.width_multiple
        wanted = sizing.width_at(i, s, units[i])
        width = multiple * round(wanted / multiple)
        widths.append(now if max(wanted, width) >= now else max(width, sizing.min_width(i)))
    return sizing.layers(units, widths)


def smallest_params(sizing: Sizing, target_params: int) -> int:
    """Return the parameters of the smallest model that the rules allow.

    Raises:
        TargetError: If it exceeds the target by more than rounding.
    """
    count = len(sizing.current.layers)
    least = sizing.layers(
        [sizing.units_at(i, math.inf) for i in range(count)], [sizing.min_width(i) for i in range(count)]
    )
    params = sizing.current.with_layers(least).num_params()
    if params > target_params + sizing.width_multiple * sizing.current.mlp_channel_params / 2:
        cut = [index for index in range(count) if index not in sizing.whole]
        whole = sizing.cuts[cut[0]].unit is None
        attention = "attention whole" if whole else "one attention unit left"
        raise TargetError(
            f"prune.target={target_params:,} parameters cannot be reached: with {attention} and an MLP width "
            f"of {sizing.min_width(cut[0])} in each of {len(cut)} layers the model still has {params:,} "
            f"parameters, {sizing.current.outside_params:,} of them outside the layers"
            + (f" and {len(sizing.whole)} layers left whole" if sizing.whole else "")
            + ". Raise prune.target."
        )
    return params


def sizes_for_target(
    sizing: Sizing, sparsity: Sequence[float], importance: Sequence[float], target_params: int
) -> tuple[tuple[LayerShape, ...], float]:
    """Find the layer sizes whose total comes as close to the target as one MLP channel allows.

    One scalar d, found by bisection, is added to every layer's sparsity. Attention units that fall due at the
    same d are removed in order of layer importance, as far as the target allows; MLP widths take up the rest,
    and are rounded by largest remainder. A model at or below the target does not change.

    Args:
        sizing: Present sizes and the rules.
        sparsity: Cumulative sparsity of each layer after this step, before d.
        importance: Normalised importance of each layer.
        target_params: Parameters of the whole model.

    Returns:
        Layer sizes with |total - target| <= width_multiple / 2 channels, and d. Where the MLPs have less left
        than a unit of attention, the total may be farther from the target.

    Raises:
        TargetError: If even the smallest model is larger.
    """
    smallest_params(sizing, target_params)
    if sizing.current.num_params() <= target_params:
        return sizing.current.layers, 0.0

    def units(d: float) -> list[int]:
        return [sizing.units_at(i, s + d) for i, s in enumerate(sparsity)]

    def widths(d: float, units: Sequence[int]) -> list[float]:
        return [sizing.width_at(i, s + d, units[i]) for i, s in enumerate(sparsity)]

    low, high = _bisect(lambda d: sizing.params(units(d), widths(d, units(d))) - target_params)
    before = units(low)
    kept = _drop_due_units(sizing, before, units(high), widths(low, before), importance, target_params)

    def sized(units: Sequence[int]) -> tuple[float, tuple[LayerShape, ...], float]:
        shift, _ = _bisect(lambda d: sizing.params(units, widths(d, units)) - target_params)
        layers = sizes_near(sizing, units, widths(shift, units), target_params)
        return abs(sizing.current.with_layers(layers).num_params() - target_params), layers, shift

    missed, layers, shift = sized(kept)
    if missed > sizing.width_multiple * sizing.current.mlp_channel_params / 2:
        # Widths at their bounds cannot offset the last attention unit: one more or fewer may be closer.
        _, layers, shift = min((sized(kept), *map(sized, _neighbours(sizing, kept))), key=lambda way: way[0])
    return layers, shift


def sizes_near(
    sizing: Sizing, units: Sequence[int], widths: Sequence[float], target_params: int
) -> tuple[LayerShape, ...]:
    """Round MLP widths beside given attention units so that the total is nearest to the target."""
    return sizing.layers(units, _round_widths(sizing, units, widths, target_params))


def _neighbours(sizing: Sizing, units: Sequence[int]) -> Iterator[list[int]]:
    """Yield the attention units with one more or one fewer in one layer."""
    for index, count in enumerate(units):
        for other in (count + 1, count - 1):
            if sizing.units_at(index, math.inf) <= other <= sizing.attention_units(index):
                yield [*units[:index], other, *units[index + 1 :]]


def _bisect(excess: Callable[[float], float]) -> tuple[float, float]:
    """Enclose the zero of a falling function of the sparsity shift d in [-1, 1]."""
    low, high = -1.0, 1.0
    if excess(low) <= 0:
        return low, low
    for _ in range(100):
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return low, high


def _drop_due_units(
    sizing: Sizing,
    before: Sequence[int],
    after: Sequence[int],
    widths: Sequence[float],
    importance: Sequence[float],
    target_params: int,
) -> list[int]:
    """Remove attention units that fall due at one d, least important layer first, as the target allows."""
    units = list(before)
    floors = [float(sizing.min_width(i)) for i in range(len(units))]
    for index in sorted(range(len(units)), key=lambda i: (importance[i], i)):
        while units[index] > after[index]:
            units[index] -= 1
            too_far = sizing.params(units, widths) < target_params
            needed = (
                sizing.params([*units[:index], units[index] + 1, *units[index + 1 :]], floors) > target_params
            )
            if too_far and not needed:
                units[index] += 1
                return units
    return units


def _round_widths(
    sizing: Sizing, units: Sequence[int], widths: Sequence[float], target_params: int
) -> list[int]:
    """Round MLP widths so that the total is nearest to the target: largest remainders are rounded up."""
    multiple, cost = sizing.width_multiple, sizing.current.mlp_channel_params
    now = [layer.mlp_width for layer in sizing.current.layers]
    rounded = []
    for i, width in enumerate(widths):
        down = multiple * math.floor(width / multiple + 1e-9)
        rounded.append(now[i] if width >= now[i] else max(down, sizing.min_width(i)))
    remainders = [width - whole for width, whole in zip(widths, rounded, strict=True)]
    missing = target_params - sizing.params(units, rounded)
    while True:
        up = missing > 0
        # An uncut width need not be a multiple: the last step up to it may be a short one.
        changes = [
            min(multiple, now[i] - width)
            if up
            else max(-(width % multiple or multiple), sizing.min_width(i) - width)
            for i, width in enumerate(rounded)
        ]
        useful = [i for i, change in enumerate(changes) if abs(missing - change * cost) < abs(missing)]
        if not useful:
            return rounded
        index = max(useful, key=lambda i: (remainders[i] if up else -remainders[i], -i))
        rounded[index] += changes[index]
        remainders[index] -= changes[index]
        missing -= changes[index] * cost
