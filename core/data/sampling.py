"""A random sample of a stream of rows whose length nobody knows, on the disk."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

READ_FOR_EACH = 8
"""So many times what will do is read of a stream, at most."""
MOST_BYTES = 5
"""So many times the bytes that will do lie on the disk while a sample is made, with a single row more."""
_MOST_KEPT = 3
_OPEN_SHARDS = 16
_TURN_ROWS = 64


def write_sample(
    file: Path,
    rows: Iterable[Any],
    *,
    seed: int,
    most_rows: int | None = None,
    most_bytes: int | None = None,
) -> tuple[int, int]:
    """Write rows as lines of JSON: all, or an equally likely part of all that were read.

    As soon as there are more than three times as many as will do, each of them stays with a chance of one
    half, and as many of those that follow are taken. Reading ends at ``READ_FOR_EACH`` times what will do.
    No fewer rows stay than will do, and at least one.

    Args:
        file: Is created, with the rows in the order of the stream.
        rows: The stream.
        seed: Of the choice.
        most_rows: Rows that will do; None for all.
        most_bytes: Bytes that will do; None for all.

    Returns:
        How many rows were kept, and how many were read.

    Raises:
        OSError: If the file cannot be written.
    """
    chance = np.random.default_rng(seed)
    rows_do, bytes_do = (math.inf if most is None else most for most in (most_rows, most_bytes))
    share, kept, size, read, read_bytes = 1.0, 0, 0, 0, 0
    out = file.open("wb")
    try:
        for row in rows:
            text = json.dumps(row, default=str, ensure_ascii=False)
            line = text.encode(errors="backslashreplace") + b"\n"  # half a character as JSON escapes it
            read, read_bytes = read + 1, read_bytes + len(line)
            if share == 1 or chance.random() < share:
                out.write(line)
                kept, size = kept + 1, size + len(line)
            while (too_many := kept > _MOST_KEPT * rows_do) or (size > _MOST_KEPT * bytes_do and kept > 1):
                out.close()
                kept, size = _halve(file, chance, max(1, rows_do) if too_many else 1)
                out, share = file.open("ab"), share / 2
            if read >= READ_FOR_EACH * rows_do or read_bytes >= READ_FOR_EACH * bytes_do:
                break
    finally:
        out.close()
    return kept, read


def _halve(file: Path, chance: np.random.Generator, least: float) -> tuple[int, int]:
    """Let each line stay with a chance of one half; return how many did, and their bytes.

    If fewer than ``least`` of them would, they are drawn again.
    """
    half, kept, size = file.with_name(f"{file.name}.half"), 0, 0
    while kept < least:
        kept, size = 0, 0
        with file.open("rb") as lines, half.open("wb") as out:
            for line in lines:
                if chance.random() < 0.5:
                    out.write(line)
                    kept, size = kept + 1, size + len(line)
    os.replace(half, file)
    return kept, size


def in_turn(stream: "datasets.IterableDataset", seed: int) -> Iterator[dict[str, Any]]:
    """Yield all rows, some from each of the open files in turn; files are opened in random order."""
    shards = stream.num_shards
    if shards == 1:
        yield from stream
        return
    order = iter(np.random.default_rng(seed).permutation(shards).tolist())
    opened: list[Iterator[Any]] = []
    while True:
        for number in itertools.islice(order, _OPEN_SHARDS - len(opened)):
            opened.append(iter(stream.shard(num_shards=shards, index=number)))
        if not opened:
            return
        for shard in list(opened):
            rows = list(itertools.islice(shard, _TURN_ROWS))
            if len(rows) < _TURN_ROWS:
                opened.remove(shard)
            yield from rows
