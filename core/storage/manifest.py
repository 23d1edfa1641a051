"""Publications: a directory whose ``MANIFEST.json`` lists every file by size and sha256 and is put last.

A directory without a manifest is not published, and is not read. A publication never changes: of several
publishers one wins, and all of them return its manifest.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from core.errors import IntegrityError, StorageError
from core.storage.entries import FileEntry, Manifest
from core.storage.store import Store, is_temporary, join_uri, local_errors, open_store, replacing

__all__ = ["MANIFEST", "FileEntry", "Manifest", "delete_publication", "fetch", "publish", "read_manifest"]

MANIFEST = "MANIFEST.json"
_CLAIM = "_CLAIM"
_THREADS = 8

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def publish(directory: Path, uri: str, *, metadata: dict[str, Any] | None = None) -> Manifest:
    """Copy every file of ``directory`` to ``uri``, then put the manifest, which makes them readable.

    Each file is read once to hash it and once to copy it. After a crash the same call goes on: what is there
    already is not copied again.

    Args:
        directory: Holds at least one file; nothing in it changes meanwhile.
        uri: Where the publication will be.
        metadata: JSON-able values to keep in the manifest.

    Returns:
        The manifest that stands at ``uri``: another publisher's, if it was first.

    Raises:
        StorageError: If ``directory`` holds no file, or the store cannot be reached or written.
    """
    store = open_store(uri)
    published = read_manifest(uri)
    if published is not None:
        return published
    start = time.monotonic()
    files = _in_parallel(functools.partial(FileEntry.of, directory), _files(directory))
    manifest, is_new = _claim(store, Manifest(files=tuple(files), metadata=metadata or {}))
    content = manifest.to_json().encode()

    def upload(entry: FileEntry) -> None:
        key = manifest.key(entry)
        if is_new or store.sha256(key) != entry.sha256:
            store.upload(directory / entry.path, key, sha256=entry.sha256)

    _in_parallel(upload, files)
    if store.write_bytes(MANIFEST, content, if_absent=True):
        _log_rate("published", store.uri, [entry.size for entry in files], start)
        return Manifest.from_json(content)
    published = read_manifest(uri)
    if published is None:
        raise StorageError(f"{store.uri} was removed while it was published. Run the step again.")
    if published.folder != manifest.folder:
        _in_parallel(store.delete, [manifest.key(entry) for entry in files])
    return published


def read_manifest(uri: str) -> Manifest | None:
    """Return the manifest at ``uri``; None if nothing is published there.

    Raises:
        IntegrityError: If it is not a manifest, or was edited.
        StorageError: If the store cannot be reached or read.
    """
    store = open_store(uri)
    try:
        content = store.read_bytes(MANIFEST)
    except FileNotFoundError:
        return None
    return Manifest.from_json(content, where=join_uri(store.uri, MANIFEST))


def fetch(uri: str, directory: Path, *, only: Sequence[str] | None = None) -> Path:
    """Return a folder with the verified files of the publication at ``uri``.

    A publication in a folder is verified where it is. Otherwise its files come to ``directory``, unless they
    are there and verify; other files there stay.

    Args:
        uri: A publication.
        directory: Created if needed.
        only: Paths of the files that are wanted; None for all.

    Raises:
        IntegrityError: If a file is not what the manifest says; it is then not in ``directory``.
        StorageError: If nothing is published at ``uri``, a file of ``only`` is not part of it, or reading or
            writing fails.
    """
    store, manifest = open_store(uri), read_manifest(uri)
    if manifest is None:
        raise StorageError(
            f"{store.uri} is not published: no {MANIFEST}. Correct the URI, or rerun its step."
        )
    entries = [entry for entry in manifest.files if only is None or entry.path in only]
    if only is not None and (absent := set(only) - {entry.path for entry in entries}):
        raise StorageError(f"{store.uri} holds no file {', '.join(sorted(absent))}. Correct the name.")
    start = time.monotonic()
    folder = store.local_path(manifest.folder)
    if folder is not None:
        _in_parallel(functools.partial(_verify, folder, where=join_uri(store.uri, manifest.folder)), entries)
        return folder
    moved = _in_parallel(functools.partial(_download, store, manifest, directory), entries)
    if any(moved):
        _log_rate("fetched", store.uri, [size for size in moved if size], start)
    return directory


def delete_publication(uri: str, *, keep_manifest: bool) -> None:
    """Remove the files of the publication at ``uri``, and the manifest too unless ``keep_manifest``.

    What is gone already, or was never published, is no error.
    """
    store, manifest = open_store(uri), read_manifest(uri)
    if not keep_manifest:
        store.delete(MANIFEST)  # first: a manifest promises its files
    if manifest is not None:
        _in_parallel(store.delete, [manifest.key(entry) for entry in manifest.files])
    if not keep_manifest:
        store.delete(_CLAIM)


def _claim(store: Store, manifest: Manifest) -> tuple[Manifest, bool]:
    """Choose where the files go; also return whether nothing can be there yet.

    The first publisher claims the names beside the manifest for its content. Other content, of a rival or of
    a rerun after a crash, goes to a folder named by its digest: no stored file is replaced by other bytes.
    """
    is_new = store.write_bytes(_CLAIM, manifest.digest.encode(), if_absent=True)
    if store.read_bytes(_CLAIM) != manifest.digest.encode():
        return dataclasses.replace(manifest, folder=manifest.digest[:16]), False
    return manifest, is_new


def _files(directory: Path) -> list[str]:
    own = (MANIFEST, _CLAIM)
    with local_errors(directory):
        paths = [path for path in directory.rglob("*") if not path.is_dir() and not is_temporary(path.name)]
    names = sorted(name for path in paths if (name := path.relative_to(directory).as_posix()) not in own)
    if not names:
        raise StorageError(f"{directory} holds no file to publish. Correct the path.")
    return names


def _verify(folder: Path, entry: FileEntry, *, where: str) -> None:
    path = folder / entry.path
    leads_elsewhere = path.resolve() != folder.resolve() / entry.path
    fault = "a file expected, a link found" if leads_elsewhere else entry.fault_of(path)
    if fault:
        raise _unlike(where, entry, fault)


def _download(store: Store, manifest: Manifest, directory: Path, entry: FileEntry) -> int:
    """Bring one file to ``directory`` unless it is there; return the bytes moved."""
    path = directory / entry.path
    if not entry.fault_of(path):
        return 0
    with replacing(path) as temporary:
        try:
            store.download(manifest.key(entry), temporary)
            fault = entry.fault_of(temporary)
        except FileNotFoundError:
            fault = "it is missing"
        if fault:
            raise _unlike(join_uri(store.uri, manifest.folder), entry, fault)
    return entry.size


def _unlike(where: str, entry: FileEntry, fault: str) -> IntegrityError:
    problem = f"{join_uri(where, entry.path)} is not what its manifest says: {fault}"
    return IntegrityError(f"{problem}. It is not used; delete the publication and rerun its step.")


def _in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results in order; after an error nothing more is begun."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def _log_rate(action: str, uri: str, sizes: Sequence[int], start: float) -> None:
    megabytes, seconds = sum(sizes) / 1e6, time.monotonic() - start
    rate = megabytes / max(seconds, 1e-3)
    log.info("%s %s: %d files, %.1f MB, %.1f s, %.0f MB/s", action, uri, len(sizes), megabytes, seconds, rate)
