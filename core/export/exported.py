"""The result of an export, and how it gets its final name."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ExportError
from core.model.config import sliced_width


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished export."""

    path: Path
    """The file or folder."""
    params: int
    """Parameters in it; tied weights count once."""
    notes: tuple[str, ...] = ()
    """Sentences for its user, such as which quantizations its widths rule out."""

    @property
    def size_bytes(self) -> int:
        """Size of the file, or of all files of the folder."""
        return sum(file.stat().st_size for file in _files(self.path))


def refuse_sliced_export(config: Any, export: str) -> None:
    """Raise an ``ExportError`` if a model is sliced, for an export that has no place for that."""
    if (width := sliced_width(config)) is not None:
        raise ExportError(
            f"a sliced model cannot be exported as {export}, which has no place for the matrices on its "
            f"shortcuts (sliced_hidden_size={width}, of prune.method=slicegpt). Export another format, or "
            "use the checkpoint itself."
        )


def check_absent(output: Path) -> None:
    """Raise an ``ExportError`` if ``output`` exists."""
    if output.exists():
        raise ExportError(f"{output} exists already. Remove it, or name another place.")


@contextlib.contextmanager
def put_when_complete(output: Path) -> Iterator[Path]:
    """Yield a path beside ``output`` for a file or folder, which becomes ``output`` once it is on the disk.

    Nothing is left after a failure.

    Raises:
        ExportError: If ``output`` exists already, or cannot be written (disk full, read-only).
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


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
