"""Files from outside: regular ones alone are read, up to a size, and what is wrong with them is one error."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import AdaptPrunerError, CheckpointError, FormatError

MAX_JSON_BYTES = 10_000_000
"""Of a file of settings, such as config.json: the index of a model of 100,000 tensors is as large. Read into
Python's objects it may take 30 times as much."""

MAX_TOKENIZER_BYTES = 200_000_000
"""Of a file of a tokenizer; the largest known one has 34 MB."""


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: If it is none, or nested too deeply.
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
        raise ValueError("it is no JSON object")
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


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: If it is larger than ``limit``, or no regular file: a pipe would never end.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
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
    """Refuse what is no regular file within ``folder``.

    The links of a Hugging Face cache lead from ``snapshots/<commit>`` to ``blobs``, and are followed.

    Raises:
        CheckpointError: If it is none.
    """
    root = folder.resolve()
    places = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file, or a link that leads nowhere. Remove it.")
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
        # What Rust calls a panic is no Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise explain(said or type(error).__name__) from error
