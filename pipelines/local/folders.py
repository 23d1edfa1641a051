"""Folders that a command writes into: tried before anything starts, and kept from other commands."""

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from core.errors import LeaseError, SettingsError
from core.storage.interface import local_errors
from core.storage.lease import time_text


def check_folders(folders: Mapping[str, Path]) -> None:
    """Make folders and try to write there.

    Args:
        folders: Setting and its value, as an error is to name them, to the folder.

    Raises:
        SettingsError: With every folder that cannot be written.
    """
    problems = []
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
            problems.append(f"{name} cannot be written ({reason}). Give a folder that you may write to.")
    if problems:
        raise SettingsError(problems)


def check_file(name: str, path: Path) -> None:
    """Make the folder of a file, and check that the file can be written.

    Args:
        name: Setting and its value, as an error is to name them.
        path: The file; one that is there already will be replaced.

    Raises:
        SettingsError: If it cannot be written.
    """
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        reason = "Is a directory" if path.is_dir() else "Permission denied"
        raise SettingsError([f"{name} cannot be written ({reason}). Name another file."])
    check_folders({name: path.parent})


@contextlib.contextmanager
def holding_folder(folder: Path, name: str) -> Iterator[None]:
    """Keep other commands out of a folder while the block runs.

    The lock is on ``run.lock`` in it, which stays and says who holds it. The kernel drops the lock when this
    process ends, however it ends; processes that it starts do not inherit it.

    Args:
        folder: A folder that is there.
        name: Setting and its value, as an error is to name them.

    Raises:
        LeaseError: If another process holds it.
        StorageError: If ``run.lock`` cannot be written.
    """
    path = folder / "run.lock"
    with local_errors(path):
        file = path.open("a+", errors="replace")
    with file:
        _lock(file, name)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time_text(time.time())}")
        file.flush()
        yield
        file.truncate(0)


def _lock(file: TextIO, name: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200) or "another process"
        raise LeaseError(
            f"{name} is in use by {holder}. Wait until that has ended, or give another --output."
        ) from None
    except OSError:
        pass  # a file system without locks
