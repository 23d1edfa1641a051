"""Packed sequences on their way into a model."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from core.machine.memory import sent
from core.model.decoder import Documents
from core.training.lessons import Lessons, open_lessons


class Rows(NamedTuple):
    """Packed sequences, as a slice of the mixture holds them: in host memory."""

    input_ids: Tensor
    """(S, T) token ids."""
    trained: Tensor
    """(S, T), 1 where a token counts in the loss, 0 on prompts."""
    starts: Tensor | None = None
    """(S, T), nonzero where a document begins, which sees nothing before it. None for one document a row."""
    lessons: Lessons | None = None
    """What a teacher was found to expect of them."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss: the first of a row has nothing before it."""
        return int(self.trained_by_row.sum())

    @property
    def trained_by_row(self) -> Tensor:
        """(S,) number of them in each row."""
        return (self.trained[:, 1:] != 0).sum(dim=1)

    def part(self, first: int, count: int) -> "Rows":
        """Return some rows of them."""
        rows = slice(first, first + count)
        starts = None if self.starts is None else self.starts[rows]
        lessons = None if self.lessons is None else self.lessons.part(first, count)
        return Rows(self.input_ids[rows], self.trained[rows], starts, lessons)

    def filled(self, multiple: int) -> "Rows":
        """Return them, and copies of the last one in which nothing is trained, up to a multiple of rows."""
        more = -len(self.input_ids) % multiple
        if not more:
            return self
        assert self.lessons is None, "they are of other rows"
        columns = [self.input_ids, self.trained, *([] if self.starts is None else [self.starts])]
        ids, trained, *starts = (torch.cat([column, column[-1:].expand(more, -1)]) for column in columns)
        trained[-more:] = 0
        return Rows(ids, trained, starts[0] if starts else None)

    def micro_batches(self, size: int, device: torch.device) -> "Iterator[MicroBatch]":
        """Yield what passes through a model at once, whose copy to an accelerator takes no time of the host.

        Args:
            size: Sequences.
            device: Where the model is.
        """
        ids = sent(self.input_ids, device).long().split(size)
        documents: Iterable[Documents | None] = itertools.repeat(None)
        if self.starts is not None:
            documents = [documents_of(starts).to(device) for starts in self.starts.split(size)]
        lessons: Iterator[tuple[Tensor, Tensor] | None] = itertools.repeat(None)
        if self.lessons is not None:
            lessons = self.lessons.micro_batches(size, device)
        yield from map(MicroBatch, ids, documents, self.trained.split(size), lessons)


def read_rows(file: Path, lessons: Sequence[Path] = ()) -> Rows:
    """Read a slice of the mixture, and what a teacher expects of it if that is stored.

    It has no starts where rows are cut anywhere.
    """
    tensors = load_file(file)
    rows = Rows(tensors["input_ids"], tensors["trained"], tensors.get("starts"))
    return rows._replace(lessons=open_lessons(lessons, rows.trained_by_row)) if lessons else rows


class MicroBatch(NamedTuple):
    """Sequences that pass through a model at once."""

    ids: Tensor
    """(B, T) int64 token ids, on the model's device."""
    documents: Documents | None
    """Those in the rows, there; None for one document a row."""
    trained: Tensor
    """(B, T) as in ``Rows``, in host memory, where it is looked up what is a target."""
    expected: tuple[Tensor, Tensor] | None = None
    """Ids and logarithms as in ``StoredLesson``, on the model's device, in the formats of their files."""


def documents_of(starts: Tensor) -> Documents:
    """Return the documents of (B, T) rows: one begins where ``starts`` is not 0, and with each row."""
    begins = starts != 0
    begins[:, 0] = True
    index = torch.arange(starts.shape[1]).expand(starts.shape)
    positions = index - torch.where(begins, index, 0).cummax(dim=1).values
    edges = torch.cat([begins.flatten().nonzero().squeeze(1), torch.tensor([starts.numel()])])
    return Documents(positions, edges.int())
