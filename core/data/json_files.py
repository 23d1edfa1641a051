"""JSON files that are one value: what they are, and the elements of a list, one after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from core.untrusted import parse_json

_CHUNK_CHARS = 2**20
_MAX_ELEMENT_CHARS = 2**28
_LINE_BYTES = 2**24
_SHOWN_CHARS = 40


def is_object(file: Path) -> bool:
    """Return whether a file is one object in many lines; if not, its lines are rows, or it is a list.

    Where the second line is an object, the first is a row that is cut short.
    """
    with file.open("rb") as opened:
        raw, second = _first_line(opened), _first_line(opened)
    if not _bare(raw).startswith(b"{") or len(raw) == _LINE_BYTES:
        return False
    return not _is_row(raw) and not (_bare(second).startswith(b"{") and _is_row(second))


def _is_row(line: bytes) -> bool:
    try:
        parse_json(_bare(line))
    except ValueError:
        return False
    return True


def is_list(file: Path) -> bool:
    """Return whether a file is one list; if not, its lines are rows.

    A first line that opens with ``[`` is a row if others follow, and it is a list of its own, or the
    beginning of none.
    """
    with file.open("rb") as opened:
        raw = _first_line(opened)
        if not _bare(raw).startswith(b"["):
            return False
        if not raw.endswith(b"\n") or not _first_line(opened):
            return True  # the only line, or one so long that it was read in part
    text = _bare(raw).decode(errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)  # valid as far as it goes
    except (RecursionError, ValueError):  # of a number of thousands of digits, too
        return False
    return False


def _first_line(file: BinaryIO) -> bytes:
    """Read on to a line that is not empty, and return it, or as much of it as a block holds."""
    lines = iter(lambda: file.readline(_LINE_BYTES), b"")
    return next((line for line in lines if _bare(line)), b"")


def _bare(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def elements(file: TextIO) -> Iterator[Any]:
    """Yield the elements of the list that a file holds; memory holds little more than one.

    Raises:
        ValueError: If the file is not valid or goes on after the list, an element is nested too deeply, or is
            larger than 256 MB.
    """
    decoder = json.JSONDecoder()
    text, place = file.read(_CHUNK_CHARS).lstrip()[1:], 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text.startswith("]", place):
            _check_end(text[place + 1 :], file)
            return
        try:
            element, end = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError("an element is nested too deeply") from None
        except json.JSONDecodeError:
            end = len(text)
        if end < len(text):  # what ends with the text may go on in the file
            yield element
            place = end
            continue
        more = file.read(max(_CHUNK_CHARS, len(text) - place))
        if not more or len(text) - place > _MAX_ELEMENT_CHARS:
            raise ValueError("an element of the list is not valid, or does not end")
        text, place = text[place:] + more, 0


def _check_end(text: str, file: TextIO) -> None:
    while not (after := text.strip()):
        if not (text := file.read(_CHUNK_CHARS)):
            return
    raise ValueError(f"after the ] of its list it goes on with {after[:_SHOWN_CHARS]!r}")
