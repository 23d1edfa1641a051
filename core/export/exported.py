"""What an export leaves behind, and how it is put in its place."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished export.

    Attributes:
        path: The file or folder that was written.
        params: Parameters in it; tied weights count once.
        size_bytes: Size of the file, or of all files of the folder.
        notes: Sentences that its user should read, such as which quantizations its widths rule out.
    """

    path: Path
    params: int
    size_bytes: int
    notes: tuple[str, ...] = ()


def check_absent(output: Path) -> None:
    """Refuse to write to what exists already, with an ``ExportError``."""
    if output.exists():
        raise ExportError(f"{output} exists already. Remove it, or name another place.")


@contextlib.contextmanager
def put_when_complete(output: Path) -> Iterator[Path]:
    """Give a name beside ``output`` to write to, a file or a folder; it becomes ``output`` at the end.

    Nothing stands under the final name until all is on the disk, and nothing is left after a failure.

    Raises:
        ExportError: If ``output`` exists already, or the disk refuses (full, read-only).
    """
    check_absent(output)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for file in _files(partial):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial.rename(output)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
