"""Documents and conversations from the rows of a source, and the count of rows that are neither."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from core.data.rows import RowError, stream_rows
from core.errors import DataError
from core.settings.texts import TextSource
from core.untrusted import parse_json

log = logging.getLogger(__name__)

Message = dict[str, str]
"""``role`` (system, user, assistant or tool) and ``content`` of one turn."""

_SHOWN_ROWS = 3
_JUDGED_ROWS = 1_000
"""Fewer are judged like so many until the source ends: malformed rows may stand together."""

_SPEAKERS = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "function_call"),
    "tool": ("tool", "function", "observation"),
}
_ROLES = {name: role for role, names in _SPEAKERS.items() for name in names}


class RowCount:
    """Counts the rows of a source; too many malformed ones are an error, the first ones are shown."""

    def __init__(self, source: TextSource, *, rows: int = 0, malformed: int = 0, empty: int = 0) -> None:
        """Go on from so many rows."""
        self.rows, self.malformed, self.empty = rows, malformed, empty
        self._source, self._first, self._warned = source, "", False

    def add(self, number: int, problem: str, *, empty: bool = False) -> None:
        """Count a row.

        Args:
            number: Its number, from 0.
            problem: What is wrong with it; "" for nothing.
            empty: Whether it holds nothing to train on.

        Raises:
            DataError: If the malformed ones are clearly more than ``max_malformed`` of all so far.
        """
        self.rows += 1
        if problem:
            self.refuse(problem, f"row {number + 1}")
        elif empty:
            self.empty += 1
            self._judge_empty(self._surely)

    def refuse(self, problem: str, row: str = "a row") -> None:
        """Count one of the rows as malformed.

        Raises:
            DataError: As ``add``.
        """
        self.malformed += 1
        if self.malformed <= _SHOWN_ROWS:
            self._first = self._first or f"{row}: {problem}"
            log.warning("%s: %s is left out: %s", self._source.path, row, problem)
        self._judge(self._surely)

    def end(self) -> None:
        """Judge by the rows so far: the source has no more.

        Raises:
            DataError: If the malformed ones are more than ``max_malformed`` of them.
        """
        self._judge(self._source.max_malformed * self.rows)
        self._judge_empty(self._source.max_malformed * self.rows)

    @property
    def _surely(self) -> float:
        """More than these are not by chance."""
        expected = self._source.max_malformed * max(self.rows, _JUDGED_ROWS)
        return float(expected + 4 * expected**0.5)

    def _judge(self, most: float) -> None:
        if self.malformed > most:
            first = f" The first is {self._first}." if self._first else ""
            raise DataError(
                f"{self._source.path}: {self.malformed} of {self.rows} rows are malformed, and "
                f"max_malformed={self._source.max_malformed:g} of them may be.{first} Correct format and "
                "columns, convert the data, or raise max_malformed."
            )

    def _judge_empty(self, most: float) -> None:
        if self.empty > most and not self._warned:
            self._warned = True
            log.warning(
                "%s: %d of %d rows are empty (no text, or no reply to train on) and left out. Check format "
                "and columns",
                self._source.path,
                self.empty,
                self.rows,
            )


def iter_documents(source: TextSource) -> Iterator[str]:
    """Yield the documents of a source of format ``text`` in order, without empty ones and exact repetitions.

    Raises:
        DataError: If the source cannot be read or has no column ``source.field``.
    """
    seen: set[int] = set()
    for text in _parsed(source):
        if digest_of(text) not in seen:
            seen.add(digest_of(text))
            yield text


def iter_conversations(source: TextSource, count: RowCount | None = None) -> Iterator[list[Message]]:
    """Yield the conversations of a source of format ``chat`` or ``instruction`` in order that have a reply.

    Args:
        source: The source.
        count: Counts its rows.

    Raises:
        DataError: If the source cannot be read, lacks a column, or has messages of an unknown layout.
    """
    return _parsed(source, count)


def _parsed(source: TextSource, count: RowCount | None = None) -> Iterator[Any]:
    count = count or RowCount(source)
    for number, row in enumerate(stream_rows(source)):
        parsed = parse_row(row, source)
        problem = str(parsed) if isinstance(parsed, RowError) else ""
        count.add(number, problem, empty=parsed is None)
        if parsed is not None and not isinstance(parsed, RowError):
            yield parsed
    count.end()


def digest_of(text: str) -> int:
    """Return a hash of 8 bytes by which repeated documents are found."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def parse_row(row: Any, source: TextSource) -> str | list[Message] | RowError | None:
    """Return the document or the conversation of a row.

    Returns:
        A text, or messages; None if the row holds nothing to train on; what is wrong with a malformed row.
    """
    if isinstance(row, RowError):
        return row
    try:
        if source.format == "text":
            text = _text(row, source.field)
            return text if text.strip() else None
        if source.format == "instruction":
            messages = _instruction(row, source)
        else:
            messages = [_message(item, row, source) for item in _messages(row, source)]
        if source.system_field and not any(message["role"] == "system" for message in messages):
            system = _text(row, source.system_field)
            messages[:0] = [{"role": "system", "content": system}] if system.strip() else []
    except RowError as error:
        return error
    replies = any(message["role"] == "assistant" and message["content"].strip() for message in messages)
    return messages if replies else None


def _instruction(row: Mapping[str, Any], source: TextSource) -> list[Message]:
    parts = [_text(row, name).strip() for name in source.prompt_fields]
    return [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": _text(row, source.response_field)},
    ]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str | None):
        raise RowError(f"column {name} holds {type(value).__name__}, not text")
    return _writable(value or "")


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("it holds half a character (a lone surrogate)") from None
    return text


def _messages(row: Mapping[str, Any], source: TextSource) -> list[Any]:
    value = row.get(source.field)
    if isinstance(value, str):  # some data sets keep conversations as JSON texts
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    if not isinstance(value, list):
        raise RowError(
            f"column {source.field} holds {type(value).__name__}, not a list of messages (columns of the "
            f"row: {', '.join(row)})"
        )
    return value


def _message(item: Any, row: Mapping[str, Any], source: TextSource) -> Message:
    if isinstance(item, dict) and "role" in item and "content" in item:
        role, content = item["role"], item["content"]
    elif isinstance(item, dict) and "from" in item and "value" in item:
        role, content = item["from"], item["value"]
    else:
        found = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
        raise RowError(
            f"a message of column {source.field} has {found} instead of role and content, or from and value "
            f"(columns of the row: {', '.join(row)})"
        )
    known = _ROLES.get(str(role).lower())
    if known is None:
        raise RowError(f"{role!r} is not a known role ({', '.join(_ROLES)})")
    # A message may have typed parts: [{"type": "text", "text": ...}].
    content = content if isinstance(content, list) else ["" if content is None else content]
    parts: list[Any] = [p.get("text") or p.get("value") if isinstance(p, dict) else p for p in content]
    if not all(isinstance(part, str) for part in parts):
        raise RowError(f"a message of column {source.field} is not text")
    return {"role": known, "content": _writable("".join(parts))}
