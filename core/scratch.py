"""Temporary folders."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SETTLED_S = 60.0
"""Age from which a folder without a lock is abandoned: a younger one may be about to be locked."""


@contextlib.contextmanager
def scratch_folder(inside: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder, in the system's temporary directory or ``inside`` another, and remove it.

    A process that is killed leaves its folder behind, with gigabytes in it. The next one on the same host
    removes that: a folder in use is locked, and the kernel drops the lock when its process ends.
    """
    place = inside or Path(tempfile.gettempdir())
    prefix = f"adapt-pruner-{socket.gethostname()}-"
    _remove_abandoned(place, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as name, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is removed either
            stack.enter_context(_lock(Path(name)))
        yield Path(name)


def _remove_abandoned(place: Path, prefix: str) -> None:
    for folder in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or just removed by another process
            if time.time() - folder.stat().st_mtime > SETTLED_S:
                with _lock(folder):
                    shutil.rmtree(folder)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder``, or raise OSError if another process does or the file system has none."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
