"""Whether two checkpoints differ: a paired bootstrap over the items that both have answered.

Items are drawn with replacement, each with the results of both checkpoints, and the difference is computed
again; the interval is where the middle 95 % of these differences lie (the percentile interval). As that is
too narrow for few items, its ends are moved to where Student's t would have them (Hesterberg 2015, section
4.4). Draws are seeded: equal results give an equal interval, and the difference of A from B mirrors that of
B from A.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from core.evaluation.items import exponential

CONFIDENCE = 0.95
_DRAWS = 10_000
_AT_ONCE = 2_000_000  # drawn items in memory
_FEW_SCORES = 10
_FEWEST = 10  # items; below, no interval is worth its name
_NORMAL = NormalDist()

Verdict = Literal["better", "worse", "no difference shown", "too few items"]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What was seen of a checkpoint on each item of a task, or on each window of a text."""

    ids: Sequence[str]
    """Names an item; no two are equal."""
    values: Sequence[float]
    """Score of each item, higher is better; or the negative log-likelihood of a window's tokens, in nats."""
    weights: Sequence[float] = ()
    """How many tokens each window predicts; empty for scores."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a checkpoint is from another one, and how sure that is."""

    value: float
    """Score less the other's; of perplexities the ratio to the other's."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    items: int
    """How many both have answered."""
    left_out: int
    """How many only one of them has."""
    verdict: Verdict
    """Of the checkpoint, seen from the other."""


def score_difference(results: Mapping[str, Observations], other: Mapping[str, Observations]) -> Difference:
    """Compare the mean scores of a task, or their average over all tasks that both have.

    Items are drawn within each task; the tasks stay. Of one task whose scores are all 0 or 1, McNemar's exact
    test must find a difference, too: where few items differ, drawing them again does not show all that chance
    can do.

    Args:
        results: Task to the scores of the checkpoint.
        other: The same of the one that it is compared with.

    Raises:
        DataError: If no task is in both, or they have no item of a task in common.
    """
    tasks = [task for task in results if task in other]
    if not tasks:
        raise DataError("the two have no task in common. Evaluate both on the same tasks.")
    pairs = [_paired(results[task], other[task], task) for task in tasks]
    gains = [own - others for own, others, _, _ in pairs]
    value = float(np.mean([gain.mean() for gain in gains]))
    generator, sign = np.random.default_rng(0), math.copysign(1.0, value)
    drawn = np.mean([_drawn_sums(sign * gain, generator) / len(gain) for gain in gains], axis=0)
    low, high = _interval(drawn, min(map(len, gains)), sign)
    verdict = _verdict(low, high, min(map(len, gains)))
    own, others, _, _ = pairs[0]
    binary = len(pairs) == 1 and np.isin(own, (0, 1)).all() and np.isin(others, (0, 1)).all()
    if binary and verdict in ("better", "worse"):
        p = mcnemar_p(int((own > others).sum()), int((own < others).sum()))
        verdict = verdict if p < 1 - CONFIDENCE else "no difference shown"
    return Difference(
        value=value,
        low=low,
        high=high,
        items=sum(map(len, gains)),
        left_out=sum(left_out for *_, left_out in pairs),
        verdict=verdict,
    )


def perplexity_ratio(results: Observations, other: Observations) -> Difference:
    """Compare perplexities: exp of the nats of all windows over the tokens that they predict.

    Raises:
        DataError: If they have no window in common, or predict another number of tokens in one: another
            tokenizer's.
    """
    own, others, tokens, left_out = _paired(results, other, "perplexity")
    total = float((own - others).sum())
    sign = math.copysign(1.0, total)
    rows = np.stack([sign * (own - others), tokens], axis=1)
    drawn = np.concatenate([counts @ rows for counts in _window_counts(len(rows))])
    low, high = _interval(drawn[:, 0] / drawn[:, 1], len(rows), sign)
    return Difference(
        value=exponential(total / tokens.sum()),
        low=exponential(low),
        high=exponential(high),
        items=len(rows),
        left_out=left_out,
        verdict=_verdict(-high, -low, len(rows)),
    )


def mcnemar_p(better: int, worse: int) -> float:
    """Return how likely equals are to differ at least as unevenly on as many items: two-sided, exact.

    Args:
        better: Items that only the one has right.
        worse: Items that only the other has right.
    """
    count = better + worse
    ways, found = 1, 0
    for k in range(min(better, worse) + 1):
        found += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, 2 * found / 2**count)


def _paired(results: Observations, other: Observations, what: str) -> tuple[_Floats, _Floats, _Floats, int]:
    """Return the values of the items that both have, their weights, and how many items only one has."""
    places, others = _places(results, what), _places(other, what)
    common = [name for name in results.ids if name in others]
    if not common:
        raise DataError(
            f"{what}: the two have no item in common. Evaluate both on the same data with the same "
            "evaluation.limit."
        )
    own_at, other_at = [places[name] for name in common], [others[name] for name in common]
    weights, other_weights = (
        np.asarray(each.weights if len(each.weights) else np.ones(len(each.ids)), dtype=np.float64)
        for each in (results, other)
    )
    if (weights[own_at] != other_weights[other_at]).any():
        raise DataError(
            f"{what}: the two predict different numbers of tokens in a window, as their tokenizers differ. "
            "Perplexities are comparable between models of the same tokenizer only."
        )
    own_values, other_values = (np.asarray(each.values, dtype=np.float64) for each in (results, other))
    left_out = len(places) + len(others) - 2 * len(common)
    return own_values[own_at], other_values[other_at], weights[own_at], left_out


def _places(results: Observations, what: str) -> dict[str, int]:
    found = {name: place for place, name in enumerate(results.ids)}
    if not len(found) == len(results.ids) == len(results.values):
        raise DataError(f"{what}: there is not one result for each item. Evaluate the checkpoint again.")
    return found


def _drawn_sums(values: _Floats, generator: np.random.Generator) -> _Floats:
    """Return for each draw the sum of as many values as there are, drawn with replacement."""
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) > _FEW_SCORES:
        return np.concatenate([drawn @ values for drawn in _drawn_counts(len(values), generator)])
    # Right and wrong answers differ in three ways, however many there are: how often each is drawn is enough.
    drawn = generator.multinomial(len(values), counts / len(values), size=_DRAWS)
    return np.asarray(drawn @ kinds, dtype=np.float64)


def _window_counts(windows: int) -> Iterable[_Floats]:
    """Yield what ``_drawn_counts`` does, each time the same; of few windows it is kept."""
    if windows * _DRAWS > _AT_ONCE:
        return _drawn_counts(windows, np.random.default_rng(0))
    return _kept_counts(windows)


@functools.lru_cache(maxsize=2)
def _kept_counts(windows: int) -> tuple[_Floats, ...]:
    return tuple(_drawn_counts(windows, np.random.default_rng(0)))


def _drawn_counts(items: int, generator: np.random.Generator) -> Iterator[_Floats]:
    """Yield, some draws at a time, how often each item is drawn: (draws, items)."""
    step = max(1, _AT_ONCE // items)
    for first in range(0, _DRAWS, step):
        draws = min(step, _DRAWS - first)
        drawn = generator.integers(items, size=(draws, items)) + items * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * items)
        yield counts.reshape(draws, items).astype(np.float64)


def _interval(drawn: _Floats, items: int, sign: float) -> tuple[float, float]:
    """Return the ends of the interval of what was drawn, times ``sign``."""
    if items < 2:
        return -math.inf, math.inf
    z, free = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2), items - 1
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    tail = _NORMAL.cdf(-student * math.sqrt(items / free))
    low, high = sorted(sign * float(end) for end in np.quantile(drawn, (tail, 1 - tail)))
    return low, high


def _verdict(low: float, high: float, items: int) -> Verdict:
    """Judge an interval of gains."""
    if items < _FEWEST:
        return "too few items"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"
