"""Untrusted files: only regular ones of limited size are read, and any fault is one error."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import AdaptPrunerError, CheckpointError, FormatError, StorageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Decoded = TypeVar("Decoded")

MAX_JSON_BYTES = 10_000_000
"""Of a file of settings, such as config.json: the index of a model of 100,000 tensors is as large. Read into
Python's objects it may take 30 times as much."""

MAX_TOKENIZER_BYTES = 200_000_000
"""Of a file of a tokenizer; the largest known one has 34 MB."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: If it is not valid, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Raises:
        ValueError: If it is none.
    """
    data = parse_json(text)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


def check_format(data: Mapping[str, Any], newest: int, where: str) -> None:
    """Refuse a stored object of a format that this version does not know.

    Args:
        data: The object; ``format`` is its number. The first versions wrote none: that is format 1.
        newest: The newest format that can be read.
        where: What an error calls the file.

    Raises:
        FormatError: If it is another one.
    """
    found = data.get("format", 1)
    if type(found) not in (int, float) or found != int(found) or not 1 <= found <= newest:
        raise FormatError(
            f"{where} is of format {found!r}, and this version of adapt-pruner reads up to {newest}. Use the "
            "version that has written it, or a newer one."
        )


def decode(
    kind: type[Decoded],
    content: str | bytes,
    where: str,
    advice: str,
    *,
    newest: int | None = None,
    error: type[AdaptPrunerError] = StorageError,
) -> Decoded:
    """Return a dataclass that a stored file holds as a JSON object; further entries are ignored.

    Args:
        kind: The dataclass; its types are checked strictly, and its ``__post_init__`` may raise ValueErrors.
        content: The JSON.
        where: The file's name in errors.
        advice: What to do about a damaged file, as a sentence.
        newest: The newest readable format; None does not check it.
        error: What to raise.

    Raises:
        FormatError: If a newer version has written it.
        AdaptPrunerError: An ``error``, if it is damaged.
    """
    hashable: Any = kind
    try:
        data = parse_object(content)
        if newest is not None:
            check_format(data, newest, where)
        decoded: Decoded = _decoder(hashable).validate_json(content, strict=True)
        return decoded
    except ValueError as problem:
        said = " ".join(_first_problem(problem).split())[:300].rstrip(".")
        raise error(f"{where} is damaged: {said}. {advice}") from problem


@functools.cache
def _decoder(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # settings are read without it

    return TypeAdapter(kind)


def _first_problem(problem: ValueError) -> str:
    from pydantic import ValidationError

    if not isinstance(problem, ValidationError):
        return str(problem)
    first = problem.errors(include_url=False, include_context=False, include_input=False)[0]
    place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"it lacks {place}"
    return f"{place}: {message[:1].lower()}{message[1:]}" if place else message


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: If it is larger than ``limit``, or no regular file: a pipe would never end.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit / 1e6:,.0f} MB")
    return content


def files_of(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Return the files of a checkpoint's folder whose names are wanted, sorted; no folders.

    Raises:
        CheckpointError: If one is a pipe or a device, or a link that leads out of the folder: what is in the
            folder is copied and handed on, and must not be someone's private file.
    """
    found = sorted(path for path in folder.iterdir() if wanted(path.name) and not path.is_dir())
    for path in found:
        check_file(path, folder)
    return found


def check_file(path: Path, folder: Path) -> None:
    """Refuse anything but a regular file within ``folder``.

    The links of a Hugging Face cache lead from ``snapshots/<commit>`` to ``blobs``, and are followed.

    Raises:
        CheckpointError: If it is none.
    """
    root = folder.resolve()
    places = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file, or a link that leads nowhere. Remove it.")
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder. Put the file itself there, or remove the link."
        )


@contextlib.contextmanager
def foreign_errors(explain: Callable[[str], AdaptPrunerError]) -> Iterator[None]:
    """Turn whatever a library raises over an untrusted file into one error; our own pass.

    Args:
        explain: Makes the error of what the library said, shortened to one line without a full stop.
    """
    try:
        yield
    except AdaptPrunerError:
        raise
    except BaseException as error:
        # A Rust panic is not an Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise explain(said or type(error).__name__) from error
