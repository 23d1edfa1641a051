"""Rows of text sources become tokens, in this process or in several; what comes out is the same."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from core.data.packing import Tokenized, tokenize_conversations, tokenize_documents
from core.data.rows import Numbers, RowError, Rows, reading
from core.data.texts import digest_of, parse_row
from core.errors import AdaptPrunerError, DataError
from core.settings.texts import TextSource
from core.untrusted import foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_ASKED = 8
"""Batches that a process is asked for at once: requests that it has not read fit into the pipe."""
_END_S = 10
"""How long a process whose pipe is closed may take to end."""


class Batch(NamedTuple):
    """What became of some rows, an entry a row."""

    documents: list[Tokenized | None]
    """None for rows without anything to train on."""
    digests: list[int]
    """Of texts, to find repeated ones; 0 for conversations."""
    problems: list[str]
    """What is wrong with malformed rows; "" for the others."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns rows of one source into tokens."""

    source: TextSource
    rows: Rows
    tokenizer: "PreTrainedTokenizerBase"
    opening: Sequence[int] = ()
    """Ids that conversations open with, where the template does not write them."""

    def read(self, numbers: Numbers) -> Batch:
        """Tokenize the rows of these numbers.

        Raises:
            DataError: If they cannot be read.
        """
        with reading(self.source):
            rows = self.rows.read(numbers)
        parsed = [parse_row(row, self.source) for row in rows]
        places = [n for n, item in enumerate(parsed) if item is not None and not isinstance(item, RowError)]
        usable: list[Any] = [parsed[place] for place in places]
        tokenized = tokenize(usable, self.source.format, self.tokenizer, self.opening) if usable else []
        problems = [str(item) if isinstance(item, RowError) else "" for item in parsed]
        batch = Batch([None] * len(rows), [0] * len(rows), problems)
        for place, text, document in zip(places, usable, tokenized, strict=True):
            if isinstance(document, RowError):
                batch.problems[place] = str(document)
            elif document is not None:
                batch.documents[place] = Tokenized(document.ids, document.trained, self.rows.divisible)
            batch.digests[place] = digest_of(text) if isinstance(text, str) else 0
        return batch


def tokenize(
    documents: Sequence[Any], kind: str, tokenizer: "PreTrainedTokenizerBase", opening: Sequence[int] = ()
) -> Sequence[Tokenized | RowError | None]:
    """Tokenize documents of a source's format: texts or conversations."""
    if kind == "text":
        return tokenize_documents(documents, tokenizer)
    return tokenize_conversations(documents, tokenizer, opening)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    asked: list[int] = field(default_factory=list)


class Workers:
    """Processes that read ahead. They end with the ``with`` block, and when this process dies.

    What is asked for comes whole and in the order in which it is taken, however many there are; without any,
    this process does the work.
    """

    def __init__(self, readers: Sequence[Reader], processes: int) -> None:
        """Prepare to start as many processes; 0 for none."""
        self.processes = processes
        self._readers = list(readers)
        self._workers: list[_Worker] = []
        self._tickets = count()
        self._asked: dict[int, tuple[int, Numbers]] = {}
        self._arrived: dict[int, Batch | AdaptPrunerError] = {}

    def __enter__(self) -> "Workers":
        """Start the processes."""
        context = multiprocessing.get_context("spawn")  # a fork would copy locks of the tokenizer's threads
        for _ in range(self.processes):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self._readers), daemon=True)
            process.start()
            there.close()
            self._workers.append(_Worker(process, here))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.kill()  # it only computes
            worker.process.join()

    def ask(self, reader: int, numbers: Numbers) -> int:
        """Ask for rows of a source.

        Args:
            reader: Which of the readers.
            numbers: Of the rows.

        Returns:
            By which to ask for the result.
        """
        ticket = next(self._tickets)
        if not self._workers:
            self._asked[ticket] = (reader, numbers)
            return ticket
        for worker in self._workers:
            while worker.asked and worker.connection.poll():
                self._receive(worker)
        worker = min(self._workers, key=lambda worker: len(worker.asked))
        if len(worker.asked) >= _MOST_ASKED:
            self._receive(worker)
        try:
            worker.connection.send((reader, numbers))
        except OSError as error:
            raise _ended(worker) from error
        worker.asked.append(ticket)
        return ticket

    def result(self, ticket: int) -> Batch:
        """Return, once, what was asked for.

        Raises:
            DataError: If the rows cannot be read, or a process has ended.
        """
        if not self._workers:
            reader, numbers = self._asked.pop(ticket)
            return _read(self._readers[reader], numbers)
        while ticket not in self._arrived:
            self._receive(next(worker for worker in self._workers if ticket in worker.asked))
        arrived = self._arrived.pop(ticket)
        if isinstance(arrived, AdaptPrunerError):
            raise arrived
        return arrived

    def _receive(self, worker: _Worker) -> None:
        try:
            self._arrived[worker.asked[0]] = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise _ended(worker) from error
        del worker.asked[0]


def _ended(worker: _Worker) -> DataError:
    worker.process.join(_END_S)
    code = worker.process.exitcode
    advice = f"with exit code {code}. What it wrote at its end is in the log above: correct that"
    if code == -signal.SIGKILL:
        advice = "as it was killed. Look for a lack of memory, give the task more of it"
    return DataError(
        f"a process that tokenizes texts has ended {advice}, and run it again: it goes on from there."
    )


def _read(reader: Reader, numbers: Numbers) -> Batch:
    """Let a reader read; whatever its rows make a library raise is one line."""

    def failed(said: str) -> DataError:
        return DataError(
            f"{reader.source.path}: rows cannot be tokenized ({said}). Check the texts and the tokenizer."
        )

    with foreign_errors(failed):
        return reader.read(numbers)


def _serve(connection: Connection, readers: Sequence[Reader]) -> None:
    """Answer the parent until it hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    while True:
        try:
            reader, numbers = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Batch | AdaptPrunerError = _read(readers[reader], numbers)
        except AdaptPrunerError as error:
            answer = error
        try:
            connection.send(answer)
        except OSError:
            return
