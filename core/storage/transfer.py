"""How the files of a publication get into a store and out again.

Files are hashed while they stream. Beside the manifest no key is ever written twice: of several publishers
the first to store a file has decided what it holds. Whoever finds other bytes there than its own stores all
of its files in a folder of its own, which the manifest then names.
"""

import functools
import hashlib
import json
import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from core.errors import IntegrityError, StorageError
from core.storage.cache import FileCache
from core.storage.hashing import file_sha256
from core.storage.interface import Store, check_key, join_uri, local_errors
from core.storage.layout import way_back
from core.storage.manifest import FileEntry, Manifest
from core.storage.store import replacing

UPLOADED = "_UPLOADED.json"
"""Beside the manifest while a publication is on its way: which files are stored already, by their sha256."""

_THREADS = 8

log = logging.getLogger(__name__)

Origin = Literal["there", "cache", "store"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class OccupiedError(Exception):
    """Beside the manifest stands a file with other bytes: of a rival, or of an attempt that was killed."""


def upload_beside(directory: Path, paths: Iterable[str], store: Store) -> list[FileEntry]:
    """Store files under their own names; those that an earlier attempt has stored are not moved again.

    Args:
        directory: Where the files are.
        paths: Relative to it.
        store: Where the manifest will be.

    Raises:
        OccupiedError: If other bytes stand under one of the names.
        StorageError: If a file is gone, or the store cannot be reached or written.
    """
    progress = _Progress(store)

    def upload(path: str) -> FileEntry:
        file, size = directory / path, _size(directory, path)
        known = progress.stored.get(path)
        sha256 = None if known and store.exists(path) else store.upload(file, path, if_absent=True)
        if sha256 is None:
            with local_errors(file):
                sha256 = file_sha256(file)
            if sha256 != (known or store.sha256(path)):
                raise OccupiedError
        progress.add(path, sha256)
        return FileEntry(path=path, size=size, sha256=sha256)

    return in_parallel(upload, paths)


def upload_apart(directory: Path, paths: Iterable[str], store: Store) -> tuple[list[FileEntry], str]:
    """Store files in a folder that no other publisher knows; also return its name."""
    folder = secrets.token_hex(8)

    def upload(path: str) -> FileEntry:
        size = _size(directory, path)
        sha256 = store.upload(directory / path, join_uri(folder, path))
        assert sha256 is not None, "nothing keeps it from being written"
        return FileEntry(path=path, size=size, sha256=sha256)

    return in_parallel(upload, paths), folder


def is_apart(folder: str) -> bool:
    """Return whether ``upload_apart`` may have given a folder its name."""
    return re.fullmatch("[0-9a-f]{16}", folder) is not None


def verify_in_place(folder: Path, where: str, entries: Iterable[FileEntry]) -> None:
    """Check files of a publication in a folder where they are.

    Args:
        folder: Holds them.
        where: Its name in errors.
        entries: What the manifest says of them.

    Raises:
        IntegrityError: If one is not what its entry says.
    """

    def verify(entry: FileEntry) -> None:
        if fault := _link_fault(folder, entry) or entry.fault_of(folder / entry.path):
            raise _unlike(where, entry, fault)

    in_parallel(verify, entries)


def read_verified(store: Store, manifest: Manifest, entry: FileEntry) -> bytes:
    """Return the content of a small file of a publication.

    Raises:
        IntegrityError: If it is not what its entry says.
    """
    folder, content = store.local_path(manifest.folder), b""
    fault = _link_fault(folder, entry) if folder is not None else ""
    if not fault:
        try:
            content = store.read_bytes(manifest.key(entry))
            fault = entry.fault(len(content), hashlib.sha256(content).hexdigest())
        except FileNotFoundError:
            fault = "it is missing"
    if fault:
        raise _unlike(join_uri(store.uri, manifest.folder), entry, fault)
    return content


def download(store: Store, manifest: Manifest, directory: Path, entries: Iterable[FileEntry]) -> list[Origin]:
    """Bring files of a publication to ``directory``, less those that are there and verify.

    Returns:
        Where each was found.

    Raises:
        IntegrityError: If a file is not what its entry says; it is then not in ``directory``.
    """
    cache = FileCache.of_environment()
    return in_parallel(functools.partial(_download, store, manifest, directory, cache), entries)


def _download(
    store: Store, manifest: Manifest, directory: Path, cache: FileCache | None, entry: FileEntry
) -> Origin:
    path = directory / entry.path
    if not entry.fault_of(path):
        return "there"
    # Not flushed to the disk: what a power cut takes away is found missing, and fetched again.
    with replacing(path, durable=False) as temporary:
        if cache is not None and cache.take(entry, temporary):
            return "cache"
        try:
            sha256 = store.download(manifest.key(entry), temporary)
            fault = entry.fault(temporary.stat().st_size, sha256)
        except FileNotFoundError:
            fault = "it is missing"
        if fault:
            raise _unlike(join_uri(store.uri, manifest.folder), entry, fault)
    if cache is not None:
        cache.keep(entry, path)
    return "store"


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results in order; after an error nothing more is begun."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


class _Progress:
    """Which files are stored beside a manifest that is not there yet; rivals may lose each other's lines.

    A folder needs none of it: what is stored there is read as fast as a list of it.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._keeps = store.local_path("") is None
        self.stored: dict[str, str] = {}
        if self._keeps:
            # Written before any file: where the server cannot keep what is there, nothing is stored.
            store.write_bytes(UPLOADED, b"{}", if_absent=True)
            try:
                stored = json.loads(store.read_bytes(UPLOADED))
                self.stored = {path: sha256 for path, sha256 in stored.items() if isinstance(sha256, str)}
            except (FileNotFoundError, ValueError, AttributeError, RecursionError):
                log.debug("%s: no file is known to be stored", store.uri)

    def add(self, path: str, sha256: str) -> None:
        with self._lock:
            if self._keeps and self.stored.get(path) != sha256:
                self.stored[path] = sha256
                self._store.write_bytes(UPLOADED, json.dumps(self.stored).encode())


def _size(directory: Path, path: str) -> int:
    check_key(path)
    file = directory / path
    try:
        with local_errors(file):
            return file.stat().st_size
    except FileNotFoundError as error:
        raise StorageError(f"{file} is gone, or a link that leads nowhere. Make it again.") from error


def _link_fault(folder: Path, entry: FileEntry) -> str:
    is_link = (folder / entry.path).resolve() != folder.resolve() / entry.path
    return "a file expected, a link found" if is_link else ""


def _unlike(where: str, entry: FileEntry, fault: str) -> IntegrityError:
    problem = f"{join_uri(where, entry.path)} is not what its manifest says: {fault}"
    return IntegrityError(f"{problem}. It is not used. {way_back(join_uri(where, entry.path))}")
