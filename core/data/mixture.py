"""The training slices of a run: sources in their shares, packed into rows, one file a phase."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from core.data.drawing import Draw, mix
from core.data.files import writing_rows
from core.data.packing import Tokenized, body_length, end_id, opening_ids, pack
from core.data.position import Position
from core.data.rows import open_rows
from core.data.whole_packing import Waiting, pack_whole, packed_tokens
from core.data.workers import Reader, Workers
from core.errors import DataError, StorageError
from core.progress import Progress
from core.settings.texts import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_HELD_ROWS = 128
"""Documents for so many rows are chosen from: then 1 to 2 % of rows of 512 tokens are padding."""
_PARALLEL_TOKENS = 4_000_000
"""Fewer are tokenized sooner than processes start."""
_FETCHED_BYTES = 16
"""Bytes of a hub data set that will do for each token; a token of English has 4 or 5."""
_LEAST_FETCHED_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source contributed to the mixture."""

    path: str
    share: float
    """Its share of the tokens, in [0, 1]."""
    tokens: int
    """Tokens drawn from it, with those of documents that no slice had a row for at the end, and without those
    of pieces that train nothing."""
    trained_tokens: int
    """Those of them that are targets of the loss."""
    documents: int
    """Documents or conversations drawn from it, repetitions included."""
    passes: int
    """How many times it was read, the last one perhaps in part; 0 if it was never drawn from."""
    malformed: int
    """Malformed rows that were left out, repetitions included."""
    empty: int
    """Rows without anything to train on, repetitions included."""


@dataclass(frozen=True, kw_only=True)
class MixtureReport:
    """Contents of the slices."""

    sources: tuple[SourceReport, ...]
    sequence_length: int
    """T, tokens a sequence."""
    sequences: tuple[int, ...]
    """Sequences of each phase's slice."""
    padding: float
    """Share of the tokens that is padding, in [0, 1]."""

    @property
    def tokens(self) -> int:
        """Tokens in all slices."""
        return self.sequence_length * sum(self.sequences)


class Parts(Protocol):
    """Keeps rows that are packed, for another attempt to go on from."""

    def position(self) -> Position | None:
        """Return where an earlier attempt stands; None if there is none."""

    def rows(self) -> Iterator[bytes]:
        """Return the rows that it has kept."""

    def discard(self) -> None:
        """Remove what is kept: it belongs to other texts."""

    def add(self, row: bytes) -> bool:
        """Take a row; return whether it is time to keep those that came since the last time."""

    def keep(self, position: Position) -> None:
        """Keep the rows that came since the last time."""


def slice_name(phase: int) -> str:
    """Return the path of a phase's slice below the data directory; phases count from 1.

    What is held out follows the last phase.
    """
    return f"slices/phase-{phase:02d}.safetensors"


def bytes_that_do(tokens: float) -> int:
    """Return the bytes of a hub data set that will do for a number of tokens."""
    return max(_LEAST_FETCHED_BYTES, int(tokens * _FETCHED_BYTES))


def write_slices(
    sources: Sequence[TextSource],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    sequences: Sequence[int],
    packing: Literal["whole", "cut"],
    seed: int,
    directory: Path,
    processes: int = 1,
    parts: Parts | None = None,
) -> MixtureReport:
    """Mix, tokenize and pack the sources, and cut the stream of rows into one file a phase (eq. 11).

    The next document always comes from the source that is furthest behind its share of the tokens. A source
    that is used up is read again in another order. Equal inputs and seeds give equal bytes, whatever the
    number of processes, and whether or not an earlier attempt was interrupted.

    Args:
        sources: The mixture; ``weight`` gives the shares.
        tokenizer: The base model's.
        sequence_length: T.
        sequences: S of each phase: disjoint consecutive slices of one stream.
        packing: As in the settings.
        seed: Of the shuffles.
        directory: Gets ``slices/phase-01.safetensors`` and so on: ``input_ids`` (S, T) int32, ``trained``
            (S, T) uint8, which is 0 for the tokens of prompts, and, if documents are whole, ``starts`` (S, T)
            uint8, which is 1 where one begins.
        processes: How many may tokenize at once; few tokens are left to this one.
        parts: Keeps what is done.

    Raises:
        DataError: If a source cannot be read, is empty, or has too many malformed rows, or if the
            ``max_tokens`` of all of them fill fewer sequences.
        StorageError: If a file cannot be written.
    """
    weights, whole = sum(source.weight for source in sources), packing == "whole"
    shares, tokens = [source.weight / weights for source in sources], sequence_length * sum(sequences)
    opening = opening_ids(tokenizer) if whole else []
    body_length(sequence_length, opening)
    columns = {"input_ids": np.int32, "trained": np.uint8} | ({"starts": np.uint8} if whole else {})
    _check_space(directory, tokens * sum(np.dtype(kind).itemsize for kind in columns.values()))
    with contextlib.ExitStack() as stack:
        readers = []
        for source, share in zip(sources, shares, strict=True):
            rows = stack.enter_context(open_rows(source, seed=seed, most_bytes=bytes_that_do(share * tokens)))
            readers.append(Reader(source=source, rows=rows, tokenizer=tokenizer, opening=opening))
        started = processes if processes > 1 and tokens >= _PARALLEL_TOKENS else 0
        workers = stack.enter_context(Workers(readers, started))
        mixture = _Mixture(readers, workers, shares, seed, sequence_length, packing, sum(sequences), parts)
        for phase, wanted in enumerate(sequences, start=1):
            with (
                Progress(f"slice {phase}", wanted * sequence_length, "tokens") as progress,
                writing_rows(directory / slice_name(phase), columns, (wanted, sequence_length)) as write,
            ):
                for row in islice(mixture.rows, wanted):
                    write(row)
                    progress.add(sequence_length)
    report = MixtureReport(
        sources=tuple(_source_report(draw) for draw in mixture.draws),
        sequence_length=sequence_length,
        sequences=tuple(sequences),
        padding=mixture.padding / max(tokens, 1),
    )
    log.info(
        "mixture: %d sequences of %d tokens, %.2f %% of them padding",
        sum(sequences),
        sequence_length,
        100 * report.padding,
    )
    return report


def _check_space(directory: Path, needed: int) -> None:
    """Raise a ``StorageError`` if the slices do not fit where they are to be written."""
    place = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"the training slices take {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB left. Set "
            "TMPDIR to a larger folder (a pod: more ephemeral storage), or lower training.tokens."
        )


def _source_report(draw: Draw) -> SourceReport:
    drawn = draw.drawn
    return SourceReport(
        path=draw.source.path,
        share=draw.share,
        tokens=drawn.tokens,
        trained_tokens=drawn.trained_tokens,
        documents=drawn.documents,
        passes=draw.passes,
        malformed=drawn.malformed,
        empty=drawn.empty,
    )


class _Mixture:
    """The stream of packed rows; goes on where an earlier attempt was interrupted."""

    def __init__(
        self,
        readers: Sequence[Reader],
        workers: Workers,
        shares: Sequence[float],
        seed: int,
        length: int,
        packing: str,
        wanted: int,
        parts: Parts | None,
    ) -> None:
        self._wanted = wanted
        self._sizes = tuple(len(reader.rows) for reader in readers)
        self._parts, self._length, self._whole = parts, length, packing == "whole"
        self._opening = readers[0].opening
        position = parts.position() if parts is not None else None
        if parts is not None and position is not None and position.source_rows != self._sizes:
            log.warning("the texts have changed since they were prepared in part: starting over")
            parts.discard()
            position = None
        self._done = position.rows if position else 0
        self.padding = position.padding if position else 0
        self._waiting = Waiting(position.waiting, position.unread) if position else Waiting()
        self._rest = list(position.unread) if position and not self._whole else []
        self.draws = [
            Draw(
                reader.source,
                number,
                workers,
                rows=len(reader.rows),
                seed=seed,
                share=shares[number],
                drawn=position.drawn[number] if position else None,
                tokens_of=self._tokens_of,
            )
            for number, reader in enumerate(readers)
        ]
        self.rows = self._rows(readers[0].tokenizer)

    def _rows(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sequence[Any]]:
        if self._done:
            assert self._parts is not None
            log.info("%d sequences were packed by an earlier attempt", self._done)
            for row in self._parts.rows():
                yield self._unpacked(row)
        documents = mix(self.draws)
        stream: Iterator[Any] = pack(documents, self._length, rest=self._rest)
        if self._whole:
            stream = pack_whole(
                documents,
                self._length,
                opening=self._opening,
                padding=end_id(tokenizer),
                held=min(_HELD_ROWS, self._wanted),
                waiting=self._waiting,
            )
        for row in stream:
            self._done += 1
            self.padding += row.padding if self._whole else 0
            arrays = row[:3] if self._whole else row[:2]
            if self._parts is not None and self._parts.add(b"".join(array.tobytes() for array in arrays)):
                self._parts.keep(self._position())
            yield arrays
        given = sum(draw.drawn.tokens for draw in self.draws)
        raise DataError(
            "training.tokens, with training.held_out_sequences, is more than the max_tokens of all "
            f"training.sources give, {given:,} tokens in {self._done:,} of {self._wanted:,} sequences. Lower "
            "it, or raise one of them."
        )

    def _tokens_of(self, document: Tokenized) -> int:
        if not self._whole:
            return len(document.ids)
        return packed_tokens(document, self._length, self._opening)

    def _unpacked(self, row: bytes) -> list[NDArray[Any]]:
        """Return the arrays of a row that was kept: the ids, and one or two of bytes."""
        ids = np.frombuffer(row, np.int32, self._length)
        return [ids, *np.frombuffer(row, np.uint8, offset=ids.nbytes).reshape(-1, self._length)]

    def _position(self) -> Position:
        return Position(
            rows=self._done,
            padding=self.padding,
            source_rows=self._sizes,
            drawn=tuple(draw.drawn for draw in self.draws),
            waiting=tuple(self._waiting),
            unread=tuple(self._waiting.unread if self._whole else self._rest),
        )
