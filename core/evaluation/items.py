"""What was measured on each item, kept as ``items.json`` beside the report of an evaluation.

Two checkpoints are compared on the items that they share, in pairs. The file is JSON::

    {"format": 1,
     "tasks": {
       "arc_easy": {
         "items": ["6b86b273ff34fce1", "d4735e3a265e16ee", ...],
         "metrics": {"acc": {"kind": "mean", "values": [1.0, 0.0, ...], "weights": null},
                     "acc_norm": {...}}},
       "wikitext": {
         "items": [...],
         "metrics": {"word_perplexity": {"kind": "perplexity", "values": [812.4, ...], "weights": [98, ...]},
                     "bits_per_byte": {"kind": "bits", ...}}}},
     "texts": {
       "perplexity": {"items": [...], "metrics": {"perplexity": {"kind": "perplexity", ...}}},
       "perplexity_pruned": {...}},
     "groups": {
       "mmlu": {"acc": {"members": [["mmlu_anatomy", "acc"], ...], "by_size": true}},
       "commonsense": {"average": {"members": [["arc_easy", "acc_norm"], ...], "by_size": false}}}}

An item of a task is a row of its data, an item of a text is a window of tokens. Its name is a hash of its
content: equal names are the same question, or the same tokens, also in another run or a larger sample.
Further items of equal content are ``...#2``, ``...#3``. Names of tasks and metrics are those of the report.

A metric over any choice of items is f(sum of values / sum of weights), where weights of null are 1 each:

=============  =====================================  =========  =======================
kind           value of an item                       weight     f(x)
=============  =====================================  =========  =======================
``mean``       the metric, for accuracy 0 or 1        1          x
``perplexity`` negative log-likelihood, in nats       tokens,    exp(x)
                                                      words ...
``bits``       negative log-likelihood, in nats       bytes      x / ln 2
=============  =====================================  =========  =======================

A metric that is no such function of its items (F1, BLEU), or that some items lack, is not in the file. A
group's metric is the mean of its members', tasks or groups, each weighted by its number of items where
``by_size``.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from core.storage.interface import join_uri
from core.storage.layout import ITEMS
from core.storage.publication import Publication
from core.untrusted import decode

FORMAT = 1
"""Of ``items.json``."""

Kind = Literal["mean", "perplexity", "bits"]
"""How a metric follows from its items."""


@dataclass(frozen=True, kw_only=True)
class MetricItems:
    """A metric of each item."""

    kind: Kind
    """How the metric follows from them."""
    values: tuple[float, ...]
    """One an item."""
    weights: tuple[float, ...] | None = None
    """One an item; None for 1 each."""

    def over_all(self) -> float:
        """Return the metric over all items."""
        total = sum(self.values)
        weight = sum(self.weights) if self.weights else float(len(self.values))
        if self.kind == "mean":
            return total / weight
        if self.kind == "bits":
            return total / weight / math.log(2)
        return exponential(total / weight)


@dataclass(frozen=True, kw_only=True)
class ItemResults:
    """The items of a task or a text, in their order, and what was measured on each."""

    items: tuple[str, ...]
    """Names, each once."""
    metrics: dict[str, MetricItems]
    """Name of a metric to its values."""

    def __post_init__(self) -> None:
        """Check the numbers of values."""
        lengths = {len(found.values) for found in self.metrics.values()}
        lengths |= {len(found.weights) for found in self.metrics.values() if found.weights is not None}
        if lengths - {len(self.items)}:
            raise ValueError(f"{len(self.items)} items, but {max(lengths)} values")


@dataclass(frozen=True, kw_only=True)
class GroupMetric:
    """How a metric of a group follows from its members'."""

    members: tuple[tuple[str, str], ...]
    """Each a task or another group, and its metric."""
    by_size: bool
    """Whether each member counts by its number of items."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """All items of an evaluation."""

    tasks: dict[str, ItemResults] = field(default_factory=dict)
    """lm-eval task to its items."""
    texts: dict[str, ItemResults] = field(default_factory=dict)
    """``perplexity`` and ``perplexity_pruned`` to their windows."""
    groups: dict[str, dict[str, GroupMetric]] = field(default_factory=dict)
    """Group to its metrics."""

    def to_json(self) -> str:
        """Return the content of ``items.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)})


def read_items(published: Publication) -> Items | None:
    """Read the items of an evaluation; None if an older version of this package has measured it.

    Args:
        published: What the step ``evaluate`` has published of a phase.

    Raises:
        FormatError: If a newer version has written them.
        StorageError: If they are damaged, or cannot be read.
    """
    if ITEMS not in published.manifest.paths:
        return None
    where = join_uri(published.uri, ITEMS)
    return decode(Items, published.read_bytes(ITEMS), where, "Rerun its step.", newest=FORMAT)


def numbered(hashes: Sequence[str]) -> tuple[str, ...]:
    """Make names of hashes: the second of equal ones gets ``#2``, and so on."""
    seen = Counter[str]()
    names = []
    for hash_ in hashes:
        seen[hash_] += 1
        names.append(hash_ if seen[hash_] == 1 else f"{hash_}#{seen[hash_]}")
    return tuple(names)


def exponential(mean: float) -> float:
    """Return exp of a mean loss; infinity beyond the largest float."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
