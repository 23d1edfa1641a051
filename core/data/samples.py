"""The other token files of a run: the calibration pool and the windows for perplexity."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.data.drawing import Draw
from core.data.files import save_sequences, writing_rows
from core.data.packing import Tokenized, body_length, opening_ids, pack
from core.data.rows import RowError, open_rows
from core.data.texts import RowCount, iter_conversations, iter_documents
from core.data.workers import Reader, Workers, tokenize
from core.errors import DataError
from core.settings.texts import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 256


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
    length, rng = body_length(sequence_length, opening), np.random.default_rng(seed)
    # A text's end token belongs between documents, not into a window; a conversation's are its own.
    end_tokens = 1 if source.format == "text" else 0
    rows: list[NDArray[np.int32]] = []
    joined = np.empty(0, np.int32)
    read = 0
    for ids in _shuffled(source, tokenizer, opening, documents, seed):
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
    source: TextSource,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    windows: int,
    length: int,
    path: Path,
    stride: int = 0,
) -> int:
    """Write the windows for perplexity: the documents in file order, joined with end tokens and cut.

    Each window opens with what the tokenizer puts before a text. The file holds ``input_ids`` (W, T) int32,
    where T is ``length`` and W is ``windows``, or as many as the text fills.

    With a stride they slide over the same text, so that W is larger. The file then holds ``trained`` (W, T)
    uint8, too: 1 for the tokens that a window is to predict, which are all in the first one and as many as
    the stride, or what is left of the text, in the others.

    Returns:
        W.

    Raises:
        DataError: If the text does not fill one window.
        StorageError: If the file cannot be written.
    """
    opening = opening_ids(tokenizer)
    stream = pack(_in_order(source, tokenizer, opening), body_length(length, opening))
    rows = [window.ids for window in islice(stream, windows)]
    if not rows:
        raise DataError(
            f"{source.path} does not fill one window of {length:,} tokens. "
            "Name a longer text, or lower evaluation.perplexity_length in a recipe."
        )
    log.info("perplexity: %d windows of %d tokens (%d wanted)", len(rows), length, windows)
    if not stride:
        save_sequences(path, _open_rows(rows, opening))
        return len(rows)
    slid = list(_sliding(np.concatenate(rows), len(rows[0]), stride))
    columns = {"input_ids": np.int32, "trained": np.uint8}
    with writing_rows(path, columns, (len(slid), length)) as write:
        for row, new in slid:
            write([*_open_rows([row], opening), np.repeat(np.array([0, 1], np.uint8), [length - new, new])])
    return len(slid)


def _sliding(text: NDArray[np.int32], length: int, stride: int) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Yield windows of a text, and how many tokens at the end of each no earlier one has predicted."""
    end = length
    yield text[:end], length
    while end < len(text):
        new = min(stride, length, len(text) - end)  # an opening may make the windows shorter than the stride
        end += new
        yield text[end - length : end], new


def _shuffled(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", opening: Sequence[int], most: int, seed: int
) -> Iterator[NDArray[np.int32]]:
    """Yield documents in random order, without their opening."""
    with open_rows(source, seed=seed, most_rows=most) as rows:
        workers = Workers([Reader(source=source, rows=rows, tokenizer=tokenizer)], 0)
        drawn = Draw(source, 0, workers, rows=len(rows), seed=seed).one_pass()
        for document in islice(drawn, most):
            yield _without(opening, document.ids)


def _in_order(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", opening: Sequence[int]
) -> Iterator[Tokenized]:
    """Yield the documents of a source in its order, without their opening."""
    count = RowCount(source)
    documents = iter_documents(source) if source.format == "text" else iter_conversations(source, count)
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        for document in tokenize(batch, source.format, tokenizer):
            if isinstance(document, RowError):
                count.refuse(str(document))
            elif document is not None:
                ids = _without(opening, document.ids)
                yield Tokenized(ids, document.trained[-len(ids) :])
    count.end()


def _without(opening: Sequence[int], ids: NDArray[np.int32]) -> NDArray[np.int32]:
    return ids[len(opening) :] if ids[: len(opening)].tolist() == list(opening) else ids


def _open_rows(rows: Sequence[NDArray[np.int32]], opening: Sequence[int]) -> list[NDArray[np.int32]]:
    return [np.concatenate([np.array(opening, np.int32), row]) for row in rows]
