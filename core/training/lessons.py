"""What a teacher expects at the trained positions of a slice: stored in files, and read while training.

At each position whose next token counts: its K likeliest tokens, and the logarithm of the probability of each
and of all others together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from core.machine.memory import sent

IDS, LOGS = "ids", "logs"
_SMALL_VOCABULARY = 2**16


def bytes_a_position(vocabulary: int, top_k: int) -> int:
    """Return what is stored of a trained position."""
    count = min(top_k, vocabulary)
    return count * format_of_ids(vocabulary).itemsize + (count + 1) * torch.float16.itemsize


def format_of_ids(vocabulary: int) -> torch.dtype:
    """Return the number format of stored token ids."""
    return torch.uint16 if vocabulary <= _SMALL_VOCABULARY else torch.int32


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Those of consecutive rows, in files; only what is asked for is read.

    Attributes:
        files: In their order.
        ends: (F,) number of positions up to the end of each file.
        rows: (S + 1,) position at which each row begins, and the end of the last one.
    """

    files: tuple[Path, ...]
    ends: Tensor
    rows: Tensor

    def part(self, first: int, count: int) -> "Lessons":
        """Return those of some rows of them."""
        return replace(self, rows=self.rows[first : first + count + 1])

    def micro_batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (N, K) ids and (N, K + 1) logarithms of what passes through a model at once."""
        for first in range(0, len(self.rows) - 1, size):
            last = min(first + size, len(self.rows) - 1)
            found = [*self._read(int(self.rows[first]), int(self.rows[last]))]
            ids, logs = (torch.cat(columns) for columns in zip(*found, strict=True))
            yield sent(ids, device), sent(logs, device)

    def _read(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        ends = self.ends.tolist()
        for file, begin, end in zip(self.files, [0, *ends], ends, strict=False):
            wanted = slice(max(first, begin) - begin, min(last, end) - begin)
            if wanted.start < wanted.stop or (first == last and begin == 0):
                with safe_open(file, framework="pt") as tensors:
                    ids, logs = (tensors.get_slice(name)[wanted] for name in (IDS, LOGS))
                yield ids, logs


def open_lessons(files: Sequence[Path], trained_by_row: Tensor) -> Lessons:
    """Return those of rows that have so many trained positions each, whose parts are in ``files``."""
    lengths = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            lengths.append(tensors.get_slice(LOGS).get_shape()[0])
    of_rows = torch.cat([torch.zeros(1, dtype=torch.long), trained_by_row.cumsum(0)])
    ends = torch.tensor(lengths).cumsum(0)
    assert ends[-1] == of_rows[-1], "each trained position has one"
    return Lessons(files=tuple(files), ends=ends, rows=of_rows)
