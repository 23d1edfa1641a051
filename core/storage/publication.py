"""Publications: a directory whose ``MANIFEST.json`` lists every file by size and sha256 and is put last.

A directory without a manifest is not published, and is not read. A publication never changes: of several
publishers one wins, and all of them return its manifest.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import StorageError
from core.storage.layout import REPORT_FORMAT
from core.storage.manifest import FileEntry, Manifest
from core.storage.store import is_temporary, join_uri, local_errors, open_store
from core.storage.transfer import (
    UPLOADED,
    OccupiedError,
    download,
    in_parallel,
    is_apart,
    upload_apart,
    upload_beside,
    verify_in_place,
)

__all__ = [
    "MANIFEST",
    "OWN",
    "FileEntry",
    "Manifest",
    "delete_publication",
    "fetch",
    "publish",
    "published_in",
    "read_manifest",
    "read_published",
    "verify_folder",
]
from core.untrusted import check_format, parse_object

MANIFEST = "MANIFEST.json"

OWN = (MANIFEST, UPLOADED)
"""What this module keeps beside the files of a publication; never part of one."""

log = logging.getLogger(__name__)


def publish(directory: Path, uri: str, *, metadata: dict[str, Any] | None = None) -> Manifest:
    """Copy every file of ``directory`` to ``uri``, then put the manifest, which makes them readable.

    Each file is read once, and hashed on its way. After a crash the same call goes on: what is there already
    is not copied again.

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
    start, paths, folder = time.monotonic(), _files(directory), ""
    try:
        files = upload_beside(directory, paths, store)
    except OccupiedError:
        published = read_manifest(uri)
        if published is not None:
            return published
        files, folder = upload_apart(directory, paths, store)
    manifest = Manifest(
        files=tuple(sorted(files, key=lambda entry: entry.path)), metadata=metadata or {}, folder=folder
    )
    content = manifest.to_json().encode()
    if store.write_bytes(MANIFEST, content, if_absent=True):
        store.delete(UPLOADED)
        _log_rate("published", store.uri, [entry.size for entry in files], start)
        return Manifest.from_json(content)
    published = read_manifest(uri)
    if published is None:
        raise StorageError(f"{store.uri} was removed while it was published. Run the step again.")
    if folder:
        in_parallel(store.delete, [manifest.key(entry) for entry in files])
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
        verify_in_place(folder, join_uri(store.uri, manifest.folder), entries)
        return folder
    moved = download(store, manifest, directory, entries)
    if any(moved):
        _log_rate("fetched", store.uri, [size for size in moved if size], start)
    return directory


def published_in(folder: Path) -> tuple[Path, Manifest] | None:
    """Return the publication that the files in ``folder`` belong to: where its manifest is, and that.

    Args:
        folder: A publication, the folder beside its manifest that holds its files, or a link to either.

    Returns:
        None for any other folder.

    Raises:
        IntegrityError: If its manifest was damaged or edited.
        StorageError: If it cannot be read.
    """
    place = folder.resolve()
    if (place / MANIFEST).is_file():
        manifest = read_manifest(str(place))
        return None if manifest is None else (place, manifest)
    if is_apart(place.name) and (place.parent / MANIFEST).is_file():
        manifest = read_manifest(str(place.parent))
        if manifest is not None and manifest.folder == place.name:
            return place.parent, manifest
    return None


def verify_folder(folder: Path, *, may_differ: Sequence[str] = ()) -> Path:
    """Compare the files of a publication with its manifest; a folder without one is left as it is.

    Files beside those of the manifest are of no concern.

    Args:
        folder: See ``published_in``.
        may_differ: Paths of files that a person may have edited.

    Returns:
        Where the files are: ``folder``, or the folder in it that its manifest names.

    Raises:
        IntegrityError: If a file is not what the manifest says.
        StorageError: If one cannot be read.
    """
    published = published_in(folder)
    if published is None:
        return folder
    start, (place, manifest) = time.monotonic(), published
    entries = [entry for entry in manifest.files if entry.path not in may_differ]
    verify_in_place(place / manifest.folder, join_uri(place, manifest.folder), entries)
    _log_rate("verified", str(place), [entry.size for entry in entries], start)
    return folder / manifest.folder if folder.resolve() == place else folder


def read_published(uri: str, name: str) -> dict[str, Any]:
    """Return a published JSON file, less its format; {} if the step has not published it."""
    manifest = read_manifest(uri)
    if manifest is None or name not in {entry.path for entry in manifest.files}:
        return {}
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as scratch:
        content = (fetch(uri, Path(scratch), only=[name]) / name).read_text()
    try:
        data = parse_object(content)
    except ValueError as error:
        raise StorageError(f"{uri}/{name} is damaged: {error}. Rerun its step.") from error
    check_format(data, REPORT_FORMAT, f"{uri}/{name}")
    data.pop("format", None)
    return data


def is_whole(uri: str) -> bool:
    """Return whether something is published at ``uri`` and all its files are there."""
    store, manifest = open_store(uri), read_manifest(uri)
    return manifest is not None and all(store.exists(manifest.key(entry)) for entry in manifest.files)


def delete_publication(uri: str, *, keep_manifest: bool, keep: Sequence[str] = ()) -> None:
    """Remove the files of the publication at ``uri``, and the manifest too unless ``keep_manifest``.

    Files whose paths are in ``keep`` stay.

    What is gone already, or was never published, is no error.
    """
    store, manifest = open_store(uri), read_manifest(uri)
    if not keep_manifest:
        store.delete(MANIFEST)  # first: a manifest promises its files
    if manifest is not None:
        in_parallel(store.delete, [manifest.key(entry) for entry in manifest.files if entry.path not in keep])
    store.delete(UPLOADED)


def _files(directory: Path) -> list[str]:
    """Return the paths of the files to publish, the largest first: what is small is lost least by a kill."""
    with local_errors(directory):
        paths = [path for path in directory.rglob("*") if not path.is_dir() and not is_temporary(path.name)]
        sizes = {path.relative_to(directory).as_posix(): path.lstat().st_size for path in paths}
    names = sorted((name for name in sizes if name not in OWN), key=lambda name: (-sizes[name], name))
    if not names:
        raise StorageError(f"{directory} holds no file to publish. Correct the path.")
    return names


def _log_rate(action: str, uri: str, sizes: Sequence[int], start: float) -> None:
    megabytes, seconds = sum(sizes) / 1e6, time.monotonic() - start
    rate = megabytes / max(seconds, 1e-3)
    files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
    log.info("%s %s: %s, %.1f MB, %.1f s, %.0f MB/s", action, uri, files, megabytes, seconds, rate)
