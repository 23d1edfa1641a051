"""The rows of a text source, in any order, in memory that does not grow with the source.

Texts and JSON are read in place, as lines whose places are listed in a file; what is in another format is
first written as such lines to a scratch folder, or is the memory-mapped table of the ``datasets`` library.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.data.archives import check_compressed, unpacked
from core.data.json_files import elements, is_list, is_object
from core.data.locations import data_files, is_hub_id, locate
from core.data.plain_text import merge_paragraphs
from core.data.sampling import in_turn, write_sample
from core.errors import DataError, full_disk
from core.scratch import scratch_folder
from core.settings.texts import TextSource
from core.untrusted import parse_json

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

Numbers = Sequence[int] | NDArray[np.int64]

_OF_MESSAGES = ("role", "content", "from", "value")
_BLOCK_BYTES = 2**24
_HEAD_ROWS = 1_000
"""So many rows at a time are asked for their columns."""
_TURN_ROWS = 64


class RowError(ValueError):
    """What is wrong with a row, as the end of a sentence."""


class Rows(Protocol):
    """Rows within reach; worker processes get them pickled."""

    @property
    def divisible(self) -> bool:
        """Whether the rows are pieces of plain texts, which may as well be cut elsewhere."""

    def columns(self, wanted: Collection[str]) -> tuple[str, ...]:
        """Return the names of columns, the wanted ones among them if any row has them."""

    def __len__(self) -> int:
        """Return how many there are."""

    def read(self, numbers: Numbers) -> list[Any]:
        """Return the rows of these numbers; in place of one that cannot be read, a ``RowError``."""


@dataclass(frozen=True)
class Lines:
    """Rows that are lines of JSON."""

    files: tuple[str, ...]
    places: str
    """A file of (R, 2) int64: where each row begins, in the files joined, and its bytes."""
    divisible: bool = False
    """See ``Rows``."""

    def __len__(self) -> int:
        """Return how many there are."""
        return os.path.getsize(self.places) // 16

    def columns(self, wanted: Collection[str]) -> tuple[str, ...]:
        """Return the names of the columns of as many rows as it takes to see the wanted ones."""
        found: dict[str, None] = {}
        for start in range(0, len(self), _HEAD_ROWS):
            rows = self.read(range(start, min(len(self), start + _HEAD_ROWS)))
            found |= dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
            if found.keys() >= {*wanted}:
                break
        return tuple(found)

    def read(self, numbers: Numbers) -> list[Any]:
        """Return the rows of these numbers."""
        places = np.memmap(self.places, np.int64, "r").reshape(-1, 2)[np.asarray(numbers, np.int64)]
        starts = np.cumsum([0, *map(os.path.getsize, self.files)])
        rows: list[Any] = []
        with contextlib.ExitStack() as stack:
            opened: dict[int, Any] = {}
            for begin, size in places.tolist():
                file = int(np.searchsorted(starts, begin, side="right")) - 1
                if file not in opened:
                    opened[file] = stack.enter_context(open(self.files[file], "rb"))
                rows.append(_parsed(os.pread(opened[file].fileno(), size, begin - int(starts[file]))))
        return rows


def _parsed(line: bytes) -> Any:
    try:
        row = parse_json(line)
    except ValueError as error:
        return RowError(f"it is not valid JSON ({' '.join(str(error).split())[:80].rstrip('.')})")
    if isinstance(row, str):
        return {"text": row}
    return row if isinstance(row, dict) else RowError(f"it is {type(row).__name__}, not an object of columns")


@dataclass(frozen=True)
class Table:
    """Rows of a memory-mapped table."""

    data: "datasets.Dataset"
    divisible: bool = False
    """See ``Rows``."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.data)

    def columns(self, _: Collection[str]) -> tuple[str, ...]:
        """Return the names of all columns."""
        return tuple(self.data.column_names)

    def read(self, numbers: Numbers) -> list[Any]:
        """Return the rows of these numbers."""
        columns = self.data[list(map(int, numbers))]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@contextlib.contextmanager
def open_rows(
    source: TextSource, *, seed: int = 0, most_rows: int | None = None, most_bytes: int | None = None
) -> Iterator[Rows]:
    """Open a source; what it needs on disk is kept until the block ends.

    The rows of a hub data set come over the network once. If it holds more than will do, a part of them is
    kept that is equally likely to be any. If it holds far more, the rest is not read: then that part is of
    the first rows of its files, which take turns, up to 16 at a time.

    Args:
        source: The source.
        seed: Chooses the rows of a hub data set that is not kept in full.
        most_rows: Rows that will do of a hub data set; None for all.
        most_bytes: Bytes that will do, as lines of JSON; None for all.

    Raises:
        DataError: If there is no such data set, if it cannot be read, lacks a column, or is empty.
    """
    location = locate(source.path)
    with scratch_folder() as scratch:
        with reading(source):
            if location is not None:
                rows = _local(source, location, scratch)
            elif "[" in source.split:
                rows = Table(_hub(source, streaming=False))
            else:
                stream = _hub(source, streaming=True)
                rows = _fetched(source, stream, scratch, seed, most_rows, most_bytes)
            if not len(rows):
                raise DataError(f"{source.path} holds no data. Check the path and split={source.split}.")
            check_columns(source, rows.columns(source.columns))
        yield rows


def stream_rows(source: TextSource) -> Iterator[Any]:
    """Yield the rows in the order of the files; a hub data set is not read further than needed.

    Raises:
        DataError: As ``open_rows``.
    """
    if locate(source.path) is None and "[" not in source.split:
        with reading(source):
            for number, row in enumerate(_hub(source, streaming=True)):
                if not number:
                    check_columns(source, tuple(row))
                yield row
        return
    with open_rows(source) as rows:
        for start in range(0, len(rows), _TURN_ROWS):
            with reading(source):
                read = rows.read(range(start, min(start + _TURN_ROWS, len(rows))))
            yield from read


def check_columns(source: TextSource, columns: Sequence[str]) -> None:
    """Raise a ``DataError`` if a column that the source names is not there."""
    for name in source.columns if columns else ():
        if name not in columns:
            raise DataError(
                f"{source.path} has no column {name}, but {', '.join(columns)}. Name one of them in the "
                "recipe."
            )


@contextlib.contextmanager
def reading(source: TextSource) -> Iterator[None]:
    """Turn whatever ``datasets`` raises into one line; its errors have no common base class."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if full := full_disk(error):
            raise full from error
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        place, advice = "local data", f"Check that the files are complete, and split={source.split}."
        if locate(source.path) is None:
            place = "Hugging Face data set"
            advice = (
                f"Check the id, subset={source.subset or '(none)'}, split={source.split}, the network and "
                "(for a private or gated set) HF_TOKEN, or name a local file."
            )
        raise DataError(f"{place} {source.path} cannot be read: {reason.rstrip('.!')}. {advice}") from error


def _hub(source: TextSource, *, streaming: bool) -> Any:
    import datasets

    if not is_hub_id(source.path):
        raise DataError(
            f"{source.path} is not a file or folder here, nor a Hugging Face data set id. Correct the path."
        )
    if not streaming:
        log.info("%s: downloading all of it: the slice %s cannot be streamed", source.path, source.split)
    datasets.disable_progress_bars()
    return datasets.load_dataset(
        source.path,
        source.subset or None,
        split=source.split,
        revision=source.revision or None,
        streaming=streaming,
    )


def _fetched(
    source: TextSource,
    stream: "datasets.IterableDataset",
    scratch: Path,
    seed: int,
    most_rows: int | None,
    most_bytes: int | None,
) -> Lines:
    """Write the columns in use of a stream as lines, or those of a part of its rows."""

    def wanted() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(in_turn(stream, seed)):
            if not number:
                check_columns(source, tuple(row))
            yield {name: _without_notes(row[name]) for name in source.columns}

    log.info("%s: reading rows over the network", source.path)
    file = scratch / "rows.jsonl"
    kept, read = write_sample(file, wanted(), seed=seed, most_rows=most_rows, most_bytes=most_bytes)
    if kept < read:
        log.info("%s: %d rows will do, drawn from the %d that were read", source.path, kept, read)
    return _lines([file], scratch, "train")


def _without_notes(value: Any) -> Any:
    """Return messages without what a data set notes of each of them."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in m.items() if k in _OF_MESSAGES} if isinstance(m, dict) else m for m in value]


def _local(source: TextSource, location: Path, scratch: Path) -> Rows:
    import datasets

    datasets.disable_progress_bars()
    kind, files = data_files(source, location)
    for file in files:
        check_compressed(file)
    _, bracket, rest = source.split.partition("[")
    split = f"train{bracket}{rest}"  # the file builders call everything they read "train"
    plain = [unpacked(file, scratch) for file in files] if kind in ("json", "text") else files
    if kind == "text":
        lines = scratch / "texts.jsonl"
        _write_lines(lines, _text_rows(plain))
        return dataclasses.replace(_lines([lines], scratch, split), divisible=True)
    if kind == "json" and not any(file.suffix == ".json" and is_object(file) for file in plain):
        lists = [_list_as_lines(file, scratch) if is_list(file) else file for file in plain]
        return _lines(lists, scratch, split)
    return Table(datasets.load_dataset(kind, data_files=[str(file) for file in files], split=split))


def _list_as_lines(file: Path, scratch: Path) -> Path:
    lines = scratch / f"{len(list(scratch.iterdir()))}.jsonl"
    with file.open(encoding="utf-8-sig") as opened:
        _write_lines(lines, elements(opened))
    return lines


def _write_lines(file: Path, rows: Iterable[Any]) -> None:
    with file.open("w") as out:
        for row in rows:
            out.write(json.dumps(row, default=str) + "\n")


def _lines(files: Sequence[Path], scratch: Path, split: str) -> Lines:
    """List where the rows of a split begin."""
    import datasets

    places, base = scratch / "places", 0
    with places.open("wb") as out:
        for file in files:
            for found in _places(file):
                np.add(found, [base, 0]).tofile(out)
            base += file.stat().st_size
    if "[" in split and (count := places.stat().st_size // 16):
        whole = np.memmap(places, np.int64, "r").reshape(-1, 2)
        with (scratch / "sliced").open("wb") as out:
            for part in datasets.ReadInstruction.from_spec(split).to_absolute({"train": count}):
                whole[part.from_ : part.to].tofile(out)
        places = scratch / "sliced"
    return Lines(tuple(map(str, files)), str(places))


def _places(file: Path) -> Iterator[NDArray[np.int64]]:
    """Yield (n, 2) starts and sizes of the lines of a file that hold something."""
    start = position = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position
            position += len(block)
            if len(ends):
                starts = np.concatenate([[start], ends[:-1] + 1])
                found = np.stack([starts, ends - starts], axis=1)
                yield found[found[:, 1] > 1]  # neither empty nor a lone carriage return
                start = int(ends[-1]) + 1
    if position - start > 1:
        yield np.array([[start, position - start]])


def _text_rows(files: Iterable[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for document in merge_paragraphs(lines):
                yield {"text": document}
