"""Pack whole documents into rows; only what is longer than a row, or a piece of plain text, is cut."""

import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.data.packing import Tokenized, opened

_SMALLEST_PIECE = 8
"""Tokens beside the opening; plain texts are not cut into less."""


class PackedRow(NamedTuple):
    """A row of whole documents, then padding."""

    ids: NDArray[np.int32]
    """(T,) token ids."""
    trained: NDArray[np.uint8]
    """(T,), 1 where the token is a target of the loss: never the first of a document, nor padding."""
    starts: NDArray[np.uint8]
    """(T,), 1 where a document begins."""
    padding: int
    """Tokens of padding."""


class Waiting:
    """Pieces that wait for a row: in the order in which they came, and by length."""

    def __init__(self, pieces: Iterable[Tokenized] = (), unread: Iterable[Tokenized] = ()) -> None:
        """Let pieces wait.

        Args:
            pieces: In their order.
            unread: Pieces of the last document that do not wait yet.
        """
        self.tokens = 0
        self.unread = deque(unread)
        self._pieces: dict[int, Tokenized] = {}
        self._lengths: list[tuple[int, int]] = []  # (length, -number): the oldest of equal ones comes last
        self._divisible: dict[int, None] = {}
        self._numbers = count()
        for piece in pieces:
            self.add(piece)

    def __iter__(self) -> Iterator[Tokenized]:
        """Return the pieces in their order."""
        return iter(self._pieces.values())

    def add(self, piece: Tokenized) -> None:
        """Let a piece wait."""
        self._add(next(self._numbers), piece)

    def _add(self, number: int, piece: Tokenized) -> None:
        self._pieces[number] = piece
        bisect.insort(self._lengths, (len(piece.ids), -number))
        if piece.divisible:
            self._divisible[number] = None
        self.tokens += len(piece.ids)

    def take_oldest(self, room: int) -> Tokenized | None:
        """Take the piece that has waited longest, if it fits."""
        oldest = next(iter(self._pieces), None)
        if oldest is None or len(self._pieces[oldest].ids) > room:
            return None
        return self._take(self._place(oldest))

    def take_longest(self, room: int) -> Tokenized | None:
        """Take the longest piece that fits."""
        place = bisect.bisect_right(self._lengths, (room, 0)) - 1
        return None if place < 0 else self._take(place)

    def take_part(self, room: int, opening: Sequence[int]) -> Tokenized | None:
        """Take the beginning of the oldest piece that may be cut anywhere; the rest waits in its place."""
        number = next(iter(self._divisible), None)
        if number is None or room < len(opening) + _SMALLEST_PIECE:
            return None
        ids, trained, _ = whole = self._pieces[number]
        assert len(ids) > room, "what fits was taken"
        rest = opened(ids[room:], trained[room:], opening, divisible=True)
        self._lengths.pop(self._place(number))
        bisect.insort(self._lengths, (len(rest.ids), -number))
        self._pieces[number] = rest
        self.tokens += len(rest.ids) - len(whole.ids)
        return Tokenized(ids[:room], trained[:room])

    def _place(self, number: int) -> int:
        return bisect.bisect_left(self._lengths, (len(self._pieces[number].ids), -number))

    def _take(self, place: int) -> Tokenized:
        length, number = self._lengths.pop(place)
        self.tokens -= length
        self._divisible.pop(-number, None)
        return self._pieces.pop(-number)


def pack_whole(
    stream: Iterable[Tokenized],
    sequence_length: int,
    *,
    opening: Sequence[int],
    padding: int,
    held: int,
    waiting: Waiting | None = None,
) -> Iterator[PackedRow]:
    """Pack whole documents into rows of T tokens; only one that is longer than a row is cut into several.

    Pieces of a cut one without any target of the loss, such as the middle of a long prompt, are left out.

    A row takes the documents that wait longest, in their order, and once the next one does not fit, the
    longest ones that do. So no document waits for more than ``held`` rows. What is left of the row takes the
    beginning of a piece of plain text, if one waits.

    Args:
        stream: Documents, opened already.
        sequence_length: T.
        opening: Ids that every piece of a cut document opens with; fewer than T.
        padding: The id that fills what is left of a row.
        held: Documents for so many rows are held in memory, to choose from.
        waiting: What an earlier call has left, and where this one keeps what it has read: with that and the
            rest of the stream, another call goes on after any row.
    """
    documents, waiting = iter(stream), Waiting() if waiting is None else waiting
    while True:
        while waiting.tokens < held * sequence_length:
            if waiting.unread:
                waiting.add(waiting.unread.popleft())
            elif (document := next(documents, None)) is not None:
                waiting.unread.extend(_pieces(document, sequence_length, opening))
            else:
                break
        if not waiting.tokens:
            return
        yield _row(_fitting(waiting, sequence_length, opening), sequence_length, padding)


def packed_tokens(document: Tokenized, sequence_length: int, opening: Sequence[int]) -> int:
    """Return how many tokens of a document ``pack_whole`` packs: not those of pieces without a target."""
    return sum(end - start for start, end in _cuts(document, sequence_length, opening))


def _cuts(document: Tokenized, length: int, opening: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the pieces of a document, but those of a cut one that hold no target."""
    size, step = len(document.ids), length - len(opening)
    cuts = [(start, min(start + step, size)) for start in range(length, size, step)]
    for start, end in [(0, min(length, size)), *cuts]:
        if document.trained[start:end].any() or 0 < size <= length:
            yield start, end


def _pieces(document: Tokenized, length: int, opening: Sequence[int]) -> Iterator[Tokenized]:
    """Cut a document that is longer than a row into pieces that are not; each opens as the document does."""
    ids, trained, divisible = document
    for start, end in _cuts(document, length, opening):
        before = opening if start else ()
        yield opened(ids[start:end], trained[start:end], before, divisible=divisible)


def _fitting(waiting: Waiting, room: int, opening: Sequence[int]) -> list[Tokenized]:
    taken = []
    for take in (waiting.take_oldest, waiting.take_longest):
        while (piece := take(room)) is not None:
            taken.append(piece)
            room -= len(piece.ids)
    if (part := waiting.take_part(room, opening)) is not None:
        taken.append(part)
    return taken


def _row(pieces: Sequence[Tokenized], length: int, padding: int) -> PackedRow:
    ids, trained = np.full(length, padding, np.int32), np.zeros(length, np.uint8)
    starts = np.zeros(length, np.uint8)
    filled = 0
    for piece in pieces:
        end = filled + len(piece.ids)
        ids[filled:end], trained[filled:end] = piece.ids, piece.trained
        trained[filled] = 0  # nothing stands before it
        starts[filled] = 1
        filled = end
    return PackedRow(ids, trained, starts, length - filled)
