"""Temporary folders."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder(inside: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder, in the system's temporary directory or ``inside`` another, and remove it."""
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-", dir=inside) as folder:
        yield Path(folder)
