"""Documents in the random order of a seed, from one source and from a mixture of several."""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core.data.packing import Tokenized
from core.data.texts import RowCount
from core.data.workers import Workers
from core.errors import DataError
from core.settings.texts import TextSource

log = logging.getLogger(__name__)

_BATCH_ROWS = 64
_AHEAD = 3
"""Batches that each process is ahead of what is used."""
_MERGED_DIGESTS = 100_000


class Seen:
    """The digests of the texts that were drawn: 8 bytes each."""

    def __init__(self, digests: NDArray[np.uint64] | None = None) -> None:
        """Begin with digests, in increasing order."""
        self._sorted = np.empty(0, np.uint64) if digests is None else digests
        self._recent: set[int] = set()

    def add(self, digest: int) -> bool:
        """Add a digest; return whether it is new."""
        if digest in self._recent:
            return False
        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        if place < len(self._sorted) and int(self._sorted[place]) == digest:
            return False
        self._recent.add(digest)
        if len(self._recent) == _MERGED_DIGESTS:
            self._sorted, self._recent = self.digests(), set()
        return True

    def digests(self) -> NDArray[np.uint64]:
        """Return all in increasing order."""
        return np.union1d(self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent)))


@dataclass
class Drawn:
    """How far a source is drawn: with that, another draw goes on."""

    passes: int = 0
    """How often it was read to the end."""
    row: int = 0
    """Rows that are done in this pass."""
    found: int = 0
    """Documents that they gave."""
    rows: int = 0
    """Rows read in all passes."""
    malformed: int = 0
    """Malformed ones among them."""
    empty: int = 0
    """Those of them without anything to train on."""
    tokens: int = 0
    trained_tokens: int = 0
    documents: int = 0
    seen: Seen = field(default_factory=Seen)
    """The texts of this pass."""

    def numbers(self) -> dict[str, int]:
        """Return all but ``seen``."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name != "seen"]
        return {name: getattr(self, name) for name in names}


class Draw:
    """The documents of one source, each pass in another random order, without empty and repeated ones."""

    def __init__(
        self,
        source: TextSource,
        reader: int,
        workers: Workers,
        *,
        rows: int,
        seed: int,
        share: float = 1.0,
        drawn: Drawn | None = None,
        tokens_of: Callable[[Tokenized], int] = lambda document: len(document.ids),
    ) -> None:
        """Begin a draw, or go on with one.

        Args:
            source: The source.
            reader: Its place among the readers of ``workers``.
            workers: Read its rows.
            rows: How many it has.
            seed: Of the first pass; each later one has the next.
            share: Its share of the tokens, in [0, 1].
            drawn: How far an earlier draw went.
            tokens_of: Counts what a document gives.
        """
        self._tokens_of = tokens_of
        self.source, self.share, self.drawn = source, share, drawn or Drawn()
        self._reader, self._workers = reader, workers
        self._rows, self._seed = rows, seed
        done = self.drawn
        self._count = RowCount(source, rows=done.rows, malformed=done.malformed, empty=done.empty)
        self._stream = self._endless()

    @property
    def is_capped(self) -> bool:
        """Whether it has given all the tokens that it may."""
        return self.source.most_tokens is not None and self.drawn.tokens >= self.source.most_tokens

    @property
    def passes(self) -> int:
        """How many times it was read, the last one perhaps in part; 0 if it was never drawn from."""
        return self.drawn.passes + (self.drawn.found > 0)

    def take(self) -> Tokenized:
        """Return the next document.

        Raises:
            DataError: If there is none, the source cannot be read, or too much of it is malformed.
        """
        document = next(self._stream)
        self.drawn.tokens += self._tokens_of(document)
        self.drawn.trained_tokens += int(document.trained.sum())
        self.drawn.documents += 1
        return document

    def one_pass(self) -> Iterator[Tokenized]:
        """Yield what is left of this pass."""
        drawn, count = self.drawn, self._count
        order = np.random.default_rng(self._seed + drawn.passes).permutation(self._rows)
        starts = iter(range(drawn.row, self._rows, _BATCH_ROWS))
        asked: deque[tuple[int, NDArray[np.int64]]] = deque()
        while True:
            while len(asked) <= math.ceil(_AHEAD * self._workers.processes * self.share):
                if (start := next(starts, None)) is None:
                    break
                numbers = order[start : start + _BATCH_ROWS]
                asked.append((self._workers.ask(self._reader, numbers), numbers))
            if not asked:
                break
            ticket, numbers = asked.popleft()
            for number, document, digest, problem in zip(
                numbers.tolist(), *self._workers.result(ticket), strict=True
            ):
                drawn.row += 1
                count.add(number, problem, empty=document is None)
                drawn.rows, drawn.malformed, drawn.empty = count.rows, count.malformed, count.empty
                if document is not None and (not digest or drawn.seen.add(digest)):
                    drawn.found += 1
                    yield document
        count.end()

    def _endless(self) -> Iterator[Tokenized]:
        drawn = self.drawn
        while True:
            yield from self.one_pass()
            if not drawn.found:
                kind = (
                    "documents" if self.source.format == "text" else "replies that the chat template writes"
                )
                raise DataError(
                    f"{self.source.path} holds no {kind}. Check its field and format, or leave it out."
                )
            drawn.passes, drawn.row, drawn.found, drawn.seen = drawn.passes + 1, 0, 0, Seen()
            log.info("%s: all documents taken, starting over (pass %d)", self.source.path, drawn.passes + 1)


def mix(draws: Sequence[Draw]) -> Iterator[Tokenized]:
    """Yield documents, the next one always from the source that is furthest behind its share of the tokens.

    A source that has given its ``max_tokens`` is left out, and the others share the rest as before. Once all
    have given theirs, it ends.

    Raises:
        DataError: See ``Draw.take``.
    """
    while left := [draw for draw in draws if not draw.is_capped]:
        whole = sum(draw.share for draw in left) if len(left) < len(draws) else 1.0
        total = sum(draw.drawn.tokens for draw in left)
        # Counting tokens, not documents: the sources' documents differ in length by orders of magnitude.
        yield max(left, key=lambda draw: _priority(draw, total / whole)).take()


def _priority(draw: Draw, tokens: float) -> tuple[float, float]:
    return draw.share * tokens - draw.drawn.tokens, draw.share
