"""The token files of a run: training slices, the calibration pool and the windows for perplexity."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.data.files import save_sequences, writing_rows
from core.data.packing import (
    Tokenized,
    end_id,
    opening_ids,
    pack,
    pack_whole,
    tokenize_conversations,
    tokenize_documents,
)
from core.data.texts import iter_conversations, iter_documents
from core.errors import DataError
from core.progress import Progress
from core.settings.texts import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 256
_HELD_ROWS = 128
"""Documents for so many rows are chosen from: then 1 to 2 % of rows of 512 tokens are padding."""


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source contributed to the mixture."""

    path: str
    share: float
    """Its share of the tokens, in [0, 1]."""
    tokens: int
    """Tokens drawn from it, with those of documents that no slice had a row for at the end."""
    trained_tokens: int
    """Those of them that are targets of the loss."""
    documents: int
    """Documents or conversations drawn from it, repetitions included."""
    passes: int
    """How many times it was read, the last one perhaps in part; 0 if it was never drawn from."""


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


def slice_name(phase: int) -> str:
    """Return the path of a phase's slice below the data directory; phases count from 1.

    What is held out follows the last phase.
    """
    return f"slices/phase-{phase:02d}.safetensors"


def write_slices(
    sources: Sequence[TextSource],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    sequences: Sequence[int],
    packing: Literal["whole", "cut"],
    seed: int,
    directory: Path,
) -> MixtureReport:
    """Mix, tokenize and pack the sources, and cut the stream of rows into one file a phase (eq. 11).

    The next document always comes from the source that is furthest behind its share of the tokens. A source
    that is used up is read again in another order. Equal inputs and seeds give equal bytes.

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

    Raises:
        DataError: If a source cannot be read or is empty.
        StorageError: If a file cannot be written.
    """
    weights = sum(source.weight for source in sources)
    whole = packing == "whole"
    opening = opening_ids(tokenizer) if whole else []
    draws = [_Draw(source, source.weight / weights, tokenizer, seed, opening) for source in sources]
    stream: Iterator[Any] = pack(_mix(draws), sequence_length)
    if whole:
        _body_length(sequence_length, opening)
        held = min(_HELD_ROWS, sum(sequences))
        stream = pack_whole(
            _mix(draws), sequence_length, opening=opening, padding=end_id(tokenizer), held=held
        )
    columns = {"input_ids": np.int32, "trained": np.uint8} | ({"starts": np.uint8} if whole else {})
    padding = 0
    for phase, wanted in enumerate(sequences, start=1):
        with (
            Progress(f"slice {phase}", wanted * sequence_length, "tokens") as progress,
            writing_rows(directory / slice_name(phase), columns, (wanted, sequence_length)) as write,
        ):
            for row in islice(stream, wanted):
                write(row)
                padding += row.padding if whole else 0
                progress.add(sequence_length)
    report = MixtureReport(
        sources=tuple(draw.report() for draw in draws),
        sequence_length=sequence_length,
        sequences=tuple(sequences),
        padding=padding / max(sequence_length * sum(sequences), 1),
    )
    log.info(
        "mixture: %d sequences of %d tokens, %.2f %% of them padding",
        sum(sequences),
        sequence_length,
        100 * report.padding,
    )
    return report


def write_calibration_pool(
    source: TextSource,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    packing: bool,
    documents: int,
    at_least: int,
    seed: int,
    path: Path,
) -> int:
    """Write the sequences that calibration draws from: one window of each document that is long enough.

    With ``packing``, shorter documents are joined to further sequences. No document is in two of them, so
    drawing rows without replacement takes no document twice. Each row opens with what the tokenizer puts
    before a text, such as a begin-of-text token.

    Args:
        source: The calibration corpus.
        tokenizer: The base model's.
        sequence_length: T.
        packing: Whether documents that are too short are joined or left out.
        documents: Most documents to tokenize.
        at_least: Rows that the caller needs.
        seed: Of the shuffle and of the places of the windows.
        path: A safetensors file with ``input_ids`` (P, T) int32.

    Returns:
        P, the rows written.

    Raises:
        DataError: If the corpus gives fewer than ``at_least`` rows.
        StorageError: If the file cannot be written.
    """
    opening = opening_ids(tokenizer)
    length, rng = _body_length(sequence_length, opening), np.random.default_rng(seed)
    # A text's end token belongs between documents, not into a window; a conversation's are its own.
    end_tokens = 1 if source.format == "text" else 0
    rows: list[NDArray[np.int32]] = []
    joined = np.empty(0, np.int32)
    read = 0
    for ids, _ in islice(_without_opening(source, tokenizer, seed), documents):
        read += 1
        body = ids[: len(ids) - end_tokens]
        if len(body) >= length:
            start = int(rng.integers(len(body) - length + 1))
            rows.append(body[start : start + length].copy())
        elif packing:
            joined = np.concatenate([joined, ids])
            if len(joined) >= length:
                rows.append(joined[:length])
                # The rest of the document is dropped: in the next row it would be drawn a second time.
                joined = np.empty(0, np.int32)
    if len(rows) < max(at_least, 1):
        size, needed = f"{sequence_length:,} tokens", f"{max(at_least, 1):,} are needed"
        if packing:
            found = f"{read:,} documents fill only {len(rows):,} calibration sequences of {size}"
        else:
            found = f"only {len(rows):,} of {read:,} documents have the {size} of a calibration sequence"
        advice = "" if packing else "set calibration.packing=true to join short documents, "
        raise DataError(
            f"{source.path}: {found}, but {needed}. Lower calibration.sequences or "
            f"calibration.sequence_length, {advice}raise calibration.pool_documents, or name a larger corpus."
        )
    save_sequences(path, _open_rows(rows, opening))
    log.info(
        "calibration pool: %d sequences of %d tokens from %d documents", len(rows), sequence_length, read
    )
    return len(rows)


def write_perplexity_windows(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", *, windows: int, length: int, path: Path
) -> int:
    """Write the windows for perplexity: the documents in file order, joined with end tokens and cut.

    Each window opens with what the tokenizer puts before a text. The file holds ``input_ids`` (W, T) int32,
    where T is ``length`` and W is ``windows``, or as many as the text fills.

    Returns:
        W.

    Raises:
        DataError: If the text does not fill one window.
        StorageError: If the file cannot be written.
    """
    opening = opening_ids(tokenizer)
    stream = pack(_without_opening(source, tokenizer, None), _body_length(length, opening))
    rows = [window.ids for window in islice(stream, windows)]
    if not rows:
        raise DataError(
            f"{source.path} does not fill one window of {length:,} tokens. "
            "Name a longer text, or lower evaluation.perplexity_length in a recipe."
        )
    save_sequences(path, _open_rows(rows, opening))
    log.info("perplexity: %d windows of %d tokens (%d wanted)", len(rows), length, windows)
    return len(rows)


class _Draw:
    """An endless stream of one source's documents, and counts of what was drawn from it."""

    def __init__(
        self,
        source: TextSource,
        share: float,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        opening: Sequence[int],
    ) -> None:
        self.source, self.share = source, share
        self.tokens = self.trained_tokens = self.documents = self.passes = 0
        self._stream = self._endless(tokenizer, seed, opening)

    def take(self) -> Tokenized:
        document = next(self._stream)
        self.tokens += len(document.ids)
        self.trained_tokens += int(document.trained.sum())
        self.documents += 1
        return document

    def report(self) -> SourceReport:
        return SourceReport(
            path=self.source.path,
            share=self.share,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            documents=self.documents,
            passes=self.passes,
        )

    def _endless(
        self, tokenizer: "PreTrainedTokenizerBase", seed: int, opening: Sequence[int]
    ) -> Iterator[Tokenized]:
        for done in count():
            empty = True
            for document in _tokenized(self.source, tokenizer, seed + done, opening):
                empty = False
                self.passes = done + 1
                yield document
            if empty:
                is_text = self.source.format == "text"
                kind = "documents" if is_text else "replies that the chat template writes"
                raise DataError(
                    f"{self.source.path} holds no {kind}. Check its field and format, or leave it out."
                )
            log.info("%s: all documents taken, starting over (pass %d)", self.source.path, done + 2)


def _mix(draws: Sequence[_Draw]) -> Iterator[Tokenized]:
    total = 0
    while True:
        # Counting tokens, not documents: the sources' documents differ in length by orders of magnitude.
        furthest_behind = max(draws, key=lambda draw: (draw.share * total - draw.tokens, draw.share))
        document = furthest_behind.take()
        total += len(document.ids)
        yield document


def _tokenized(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", seed: int | None, opening: Sequence[int] = ()
) -> Iterator[Tokenized]:
    if source.format == "text":
        documents = iter_documents(source, seed)
        while texts := list(islice(documents, _BATCH_DOCUMENTS)):
            yield from tokenize_documents(texts, tokenizer)
    else:
        conversations = iter_conversations(source, seed)
        while batch := list(islice(conversations, _BATCH_DOCUMENTS)):
            yield from tokenize_conversations(batch, tokenizer, opening)


def _without_opening(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", seed: int | None
) -> Iterator[Tokenized]:
    opening = opening_ids(tokenizer)
    for document in _tokenized(source, tokenizer, seed):
        opened = document.ids[: len(opening)].tolist() == opening
        skipped = len(opening) if opened else 0
        yield Tokenized(document.ids[skipped:], document.trained[skipped:])


def _body_length(length: int, opening: Sequence[int]) -> int:
    if length <= len(opening):
        raise DataError(f"sequences of {length} tokens leave no room for text. Raise the sequence length.")
    return length - len(opening)


def _open_rows(rows: Sequence[NDArray[np.int32]], opening: Sequence[int]) -> list[NDArray[np.int32]]:
    return [np.concatenate([np.array(opening, np.int32), row]) for row in rows]
