"""Publications: a directory whose ``MANIFEST.json`` lists every file by size and sha256 and is put last.

A directory without a manifest is not published, and is not read. A publication never changes: of several
publishers one wins, and all of them return that one's.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import StorageError
from core.storage.interface import Store, is_temporary, join_uri, local_errors
from core.storage.layout import REPORT, REPORT_FORMAT
from core.storage.manifest import FileEntry, Manifest
from core.storage.store import open_store
from core.storage.transfer import (
    UPLOADED,
    OccupiedError,
    download,
    in_parallel,
    is_apart,
    read_verified,
    upload_apart,
    upload_beside,
    verify_in_place,
)
from core.untrusted import check_format, parse_object

MANIFEST = "MANIFEST.json"

OWN = (MANIFEST, UPLOADED)
"""What this module keeps beside the files of a publication; never part of one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A publication whose manifest has been read: once, as it never changes."""

    uri: str
    """Where it is."""
    manifest: Manifest
    """The files it holds."""
    store: Store = field(repr=False, compare=False)
    """The store at ``uri``."""

    @property
    def digest(self) -> str:
        """The digest of the files without the step's report, which says how long the step took."""
        return Manifest(files=tuple(entry for entry in self.manifest.files if entry.path != REPORT)).digest

    @property
    def folder(self) -> Path | None:
        """The folder that holds the files; None if the store is not a folder."""
        return self.store.local_path(self.manifest.folder)

    def fetch(self, directory: Path, *, only: Sequence[str] | None = None) -> Path:
        """Return a folder with the verified files.

        A publication in a folder is verified in place. Otherwise its files are copied to ``directory``, less
        those that are there and verify; other files there stay.

        Args:
            directory: Created if needed.
            only: Paths of the wanted files; None for all.

        Raises:
            IntegrityError: If a file is not what the manifest says; it is then not in ``directory``.
            StorageError: If a file of ``only`` is not part of the publication, or reading or writing fails.
        """
        entries = list(self.manifest.files) if only is None else self._entries(only)
        if self.folder is not None:
            self._verify(self.folder, entries)
            return self.folder
        start = time.monotonic()
        places = download(self.store, self.manifest, directory, entries)
        for place, action in (("store", "fetched"), ("cache", "copied from the node's cache, not from")):
            sizes = [entry.size for entry, found in zip(entries, places, strict=True) if found == place]
            if sizes:
                _log_rate(action, self.store.uri, sizes, start)
        return directory

    def read_bytes(self, name: str) -> bytes:
        """Return the verified content of a small file; see ``fetch`` for the errors."""
        return read_verified(self.store, self.manifest, *self._entries([name]))

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file without its format number; see ``fetch`` for further errors.

        Raises:
            FormatError: If a newer version has written it.
        """
        where = join_uri(self.uri, name)
        try:
            data = parse_object(self.read_bytes(name))
        except ValueError as error:
            raise StorageError(f"{where} is damaged: {error}. Rerun its step.") from error
        check_format(data, REPORT_FORMAT, where)
        data.pop("format", None)
        return data

    def is_whole(self) -> bool:
        """Return whether all files are there."""
        return all(
            in_parallel(self.store.exists, [self.manifest.key(entry) for entry in self.manifest.files])
        )

    def verify(self, *, may_differ: Sequence[str] = ()) -> None:
        """Compare the files with the manifest where they are, in a folder.

        Args:
            may_differ: Paths of files that a person may have edited.

        Raises:
            IntegrityError: If a file is not what the manifest says.
            StorageError: If one cannot be read.
        """
        assert self.folder is not None, "only a folder is verified in place"
        start = time.monotonic()
        entries = [entry for entry in self.manifest.files if entry.path not in may_differ]
        self._verify(self.folder, entries)
        _log_rate("verified", self.store.uri, [entry.size for entry in entries], start)

    def delete(self, *, keep_manifest: bool = False, keep: Sequence[str] = ()) -> None:
        """Remove the files except those in ``keep``, and the manifest too unless ``keep_manifest``."""
        if not keep_manifest:
            self.store.delete(MANIFEST)  # first: a manifest promises its files
        gone = [self.manifest.key(entry) for entry in self.manifest.files if entry.path not in keep]
        in_parallel(self.store.delete, [*gone, UPLOADED])

    def _verify(self, folder: Path, entries: Sequence[FileEntry]) -> None:
        verify_in_place(folder, join_uri(self.store.uri, self.manifest.folder), entries)

    def _entries(self, names: Sequence[str]) -> list[FileEntry]:
        if absent := set(names) - set(self.manifest.paths):
            raise StorageError(
                f"{self.store.uri} holds no file {', '.join(sorted(absent))}. Correct the name."
            )
        return [entry for entry in self.manifest.files if entry.path in names]


def find_publication(uri: str) -> Publication | None:
    """Open the publication at ``uri``; None if nothing is published there.

    Raises:
        IntegrityError: If its manifest is damaged or was edited.
        StorageError: If the store cannot be reached or read.
    """
    store = open_store(uri)
    try:
        content = store.read_bytes(MANIFEST)
    except FileNotFoundError:
        return None
    manifest = Manifest.from_json(content, where=join_uri(store.uri, MANIFEST))
    return Publication(uri=uri, manifest=manifest, store=store)


def open_publication(uri: str) -> Publication:
    """Open the publication at ``uri``.

    Raises:
        IntegrityError: If its manifest is damaged or was edited.
        StorageError: If nothing is published there, or the store cannot be reached or read.
    """
    published = find_publication(uri)
    if published is None:
        where = open_store(uri).uri
        raise StorageError(f"{where} is not published: no {MANIFEST}. Correct the URI, or rerun its step.")
    return published


def publish(directory: Path, uri: str, *, metadata: dict[str, Any] | None = None) -> Publication:
    """Copy every file of ``directory`` to ``uri``, then put the manifest, which makes them readable.

    Each file is read once, and hashed on its way. After a crash the same call continues: what is there
    already is not copied again.

    Args:
        directory: Holds at least one file; nothing in it changes meanwhile.
        uri: Where the publication will be.
        metadata: JSON-able values to keep in the manifest.

    Returns:
        What stands at ``uri``: another publisher's, if it was first.

    Raises:
        StorageError: If ``directory`` holds no file, if a file that was stored is gone before the manifest is
            put, or the store cannot be reached or written.
    """
    published = find_publication(uri)
    if published is not None:
        return published
    store = open_store(uri)
    start, paths, folder = time.monotonic(), _files(directory), ""
    try:
        files = upload_beside(directory, paths, store)
    except OccupiedError:
        published = find_publication(uri)
        if published is not None:
            return published
        files, folder = upload_apart(directory, paths, store)
    manifest = Manifest(
        files=tuple(sorted(files, key=lambda entry: entry.path)), metadata=metadata or {}, folder=folder
    )
    if not Publication(uri=uri, manifest=manifest, store=store).is_whole():
        raise StorageError(
            f"{store.uri} lost a file while it was published, as if somebody had cleaned the store. Run the "
            "step again."
        )
    content = manifest.to_json().encode()
    if store.write_bytes(MANIFEST, content, if_absent=True):
        store.delete(UPLOADED)
        _log_rate("published", store.uri, [entry.size for entry in files], start)
        return Publication(uri=uri, manifest=Manifest.from_json(content), store=store)
    published = find_publication(uri)
    if published is None:
        raise StorageError(f"{store.uri} was removed while it was published. Run the step again.")
    if folder:
        in_parallel(store.delete, [manifest.key(entry) for entry in files])
    return published


def published_in(folder: Path) -> Publication | None:
    """Return the publication that the files in ``folder`` belong to; None for any other folder.

    Args:
        folder: A publication, the folder beside its manifest that holds its files, or a link to either.

    Raises:
        IntegrityError: If its manifest is damaged or was edited.
        StorageError: If it cannot be read.
    """
    place = folder.resolve()
    if (place / MANIFEST).is_file():
        return find_publication(str(place))
    if is_apart(place.name) and (place.parent / MANIFEST).is_file():
        published = find_publication(str(place.parent))
        if published is not None and published.manifest.folder == place.name:
            return published
    return None


def verify_folder(folder: Path, *, may_differ: Sequence[str] = ()) -> Path:
    """Verify the publication in a folder; any other folder is left as it is.

    Files beside those of the manifest do not matter.

    Args:
        folder: See ``published_in``.
        may_differ: See ``Publication.verify``, also for the errors.

    Returns:
        Where the files are: ``folder``, or the folder in it that its manifest names.
    """
    published = published_in(folder)
    if published is None:
        return folder
    published.verify(may_differ=may_differ)
    return folder / published.manifest.folder if str(folder.resolve()) == published.uri else folder


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
