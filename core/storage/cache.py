"""Files of publications on a disk that the tasks of a node share: what one has fetched, the others copy.

Nothing depends on it. A file that is missing or damaged there comes from the store; where the disk cannot be
used, a warning says so, and the run goes on without.
"""

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from core.errors import StorageError
from core.quantities import bytes_text
from core.storage.hashing import copy_hashed
from core.storage.manifest import FileEntry
from core.storage.store import replacing

CACHE = "ADAPT_PRUNER_CACHE"
"""Environment variable that names its folder."""

_SMALLEST_BYTES = 1 << 20
"""Smaller files are fetched as fast from the store."""
_STAYS_FREE = 0.1
"""Share of the disk that is left free."""

log = logging.getLogger(__name__)


class FileCache:
    """Files by the sha256 of their content; those that were used longest ago make room for others."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which the first file creates; several processes may use it at once."""
        self._folder, self._lock, self._given_up, self._found_full = folder, threading.Lock(), False, False

    @classmethod
    def of_environment(cls) -> "FileCache | None":
        """Return the cache that ``ADAPT_PRUNER_CACHE`` names, if it names one."""
        folder = os.environ.get(CACHE, "")
        return cls(Path(folder)) if folder else None

    def take(self, entry: FileEntry, path: Path) -> bool:
        """Copy what an entry describes to ``path``; return whether it was there, and whole."""
        if entry.size < _SMALLEST_BYTES or self._given_up:
            return False
        kept = self._place(entry)
        try:
            sha256 = copy_hashed(kept, path)
            if not (fault := entry.fault(path.stat().st_size, sha256)):
                os.utime(kept)
                return True
            log.warning("%s is damaged: %s. It comes from the store instead.", kept, fault)
            kept.unlink(missing_ok=True)
        except FileNotFoundError:
            log.debug("%s is not there", kept)  # never was, or made room meanwhile
        except OSError as error:
            self._give_up(error)
        return False

    def keep(self, entry: FileEntry, file: Path) -> None:
        """Keep a copy of a file that an entry describes; what finds no room is left out, with a warning."""
        if entry.size < _SMALLEST_BYTES or self._given_up:
            return
        kept = self._place(entry)
        try:
            if kept.exists():
                return
            if not self._make_room(entry.size):
                return self._say_full(entry)
            with suppress(FileExistsError), replacing(kept, if_absent=True, durable=False) as temporary:
                copy_hashed(file, temporary)  # another task may be faster
        except (OSError, StorageError) as error:
            self._give_up(error)

    def _give_up(self, error: OSError | StorageError) -> None:
        with self._lock:
            if not self._given_up:
                said = (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".")
                log.warning(
                    "the cache in %s is not used, all comes from the store: %s. It should be a folder that "
                    "can be written: see ADAPT_PRUNER_CACHE, in pods the claim of cluster.cache_claim.",
                    self._folder,
                    said,
                )
            self._given_up = True

    def _say_full(self, entry: FileEntry) -> None:
        with self._lock:
            if not self._found_full:
                disk = shutil.disk_usage(self._folder)
                log.warning(
                    "the cache in %s has no room for %s of %s, which comes from the store each time: %s are "
                    "free, and %.0f%% of the %s of the disk stay so. Give it a larger disk.",
                    self._folder,
                    entry.path,
                    bytes_text(entry.size),
                    bytes_text(disk.free),
                    100 * _STAYS_FREE,
                    bytes_text(disk.total),
                )
            self._found_full = True

    def _place(self, entry: FileEntry) -> Path:
        return self._folder / entry.sha256[:2] / entry.sha256

    def _make_room(self, size: int) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self._folder)
        stays_free = round(_STAYS_FREE * disk.total)
        files = sorted(self._files())
        if disk.free + sum(held for _, held, _ in files) < size + stays_free:
            return False
        for _, _, file in files:
            if shutil.disk_usage(self._folder).free >= size + stays_free:
                break
            file.unlink(missing_ok=True)
        return True

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each file was last used, its size and its place; copies that were interrupted, too."""
        for folder in self._folder.glob("[0-9a-f][0-9a-f]"):
            for file in folder.iterdir():
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue  # another task has removed it
                yield stat.st_mtime, stat.st_size, file
