"""Stores: a local folder or an S3 bucket behind one small interface.

A key is a relative path with slashes. Writing is atomic: a reader finds the old bytes, the new ones or none.
What goes wrong is a ``StorageError`` of one line: what, where, what to do. Reading a missing key is a
``FileNotFoundError``.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from core.errors import StorageError
from core.storage.hashing import copy_hashed, file_sha256

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
_MISSING = (FileNotFoundError, NotADirectoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a store, as a listing tells of it."""

    key: str
    """Where it is; of an incomplete upload, where it was to be."""
    size: int
    """Bytes."""
    modified_s: float
    """When it was written, in seconds since 1970 (UTC)."""
    upload: str = ""
    """What the server calls an incomplete upload."""


class Store(Protocol):
    """Where the files of runs are kept."""

    uri: str
    """The store's address, without a slash at the end."""

    def read_bytes(self, key: str) -> bytes:
        """Return the content of ``key``."""

    def write_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write ``data``; return False and write nothing if ``if_absent`` and ``key`` is there."""

    def exists(self, key: str) -> bool:
        """Return whether ``key`` is there."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield every key that starts with ``prefix``."""

    def stored(self, prefix: str = "") -> Iterator[StoredFile]:
        """Yield every file whose key starts with ``prefix``, sorted by key."""

    def unfinished(self, prefix: str = "") -> Iterator[StoredFile]:
        """Yield what writes below ``prefix`` that are interrupted, or still going on, have put aside.

        These are temporary files in a folder, and incomplete multipart uploads on S3. No listing shows them.
        """

    def discard(self, unfinished: StoredFile) -> None:
        """Remove what ``unfinished`` has named, if it is there."""

    def delete(self, key: str) -> None:
        """Remove ``key`` if it is there."""

    def upload(self, path: Path, key: str, *, if_absent: bool = False) -> str | None:
        """Copy the file ``path`` into the store and return the sha256 of what was copied.

        With ``if_absent``, return None and change nothing if ``key`` is there.
        """

    def download(self, key: str, path: Path) -> str:
        """Copy ``key`` to the file ``path`` and return the sha256; not atomic (see ``replacing``)."""

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of the bytes of ``key``, which are all read; None if it is not there."""

    def local_path(self, key: str) -> Path | None:
        """Return the real path of ``key`` ("" for the whole store), or None if the store is not a folder."""


def open_store(uri: str | os.PathLike[str]) -> Store:
    """Open the store at ``uri``: a folder's path, ``file:///folder`` or ``s3://bucket/prefix``.

    Nothing is created or contacted yet. The endpoint and the credentials of S3 come from boto3's environment.

    Raises:
        StorageError: If ``uri`` is of another kind, or boto3's environment is invalid.
    """
    uri = os.fspath(uri)
    scheme, separator, _ = uri.partition("://")
    parts = urlsplit(uri)
    if not separator and uri:
        return LocalStore(Path(uri))
    if scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return LocalStore(Path(unquote(parts.path)))
    if scheme == "s3" and parts.netloc and "@" not in parts.netloc:
        from core.storage.s3 import S3Store  # boto3 takes a quarter of a second

        return S3Store(parts.netloc, uri.removeprefix(f"s3://{parts.netloc}").strip("/"))
    shown = re.sub("//.*@", "//", uri) or "an empty URI"
    raise StorageError(f"{shown} is not a store. Give a folder, file:///folder or s3://bucket/prefix.")


def join_uri(base: str | os.PathLike[str], *parts: str) -> str:
    """Return the URI of ``parts`` below ``base``."""
    return "/".join([os.fspath(base).rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))])


def check_key(key: str) -> None:
    """Raise a StorageError unless ``key`` is a relative path that cannot leave the folder it is joined to."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or not key.isprintable():
        raise StorageError(f"{key!r} leaves its folder. Use a relative path with slashes and without '..'.")


def is_temporary(name: str) -> bool:
    """Return whether a file ``name`` is of the kind that an interrupted write leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Raise what the system says about ``path`` as a StorageError; pass on FileNotFound and FileExists."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        advice = "Free space" if error.errno in _FULL else "Check its owner and permissions"
        temporary = _TEMPORARY.fullmatch(path.name)
        shown = path.with_name(temporary[1]) if temporary else path
        problem = f"{shown} cannot be read or written: {reason}"
        raise StorageError(f"{problem}. {advice}, or use another folder.") from error


@contextlib.contextmanager
def replacing(path: Path, *, if_absent: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes the name ``path`` if the block succeeds.

    Unless it need not be ``durable``, the bytes are on the disk before the name is: a power cut could leave
    the name alone otherwise.

    Raises:
        FileExistsError: If ``if_absent`` and ``path`` is there.
        StorageError: If the folder cannot be written or is full.
    """
    with local_errors(path):
        temporary = _temporary_beside(path)
        try:
            yield temporary
            if durable:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            (_link if if_absent else os.replace)(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    for _ in range(10):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            return temporary
        except FileExistsError:
            break
        except FileNotFoundError:
            continue  # another process has just removed the folder because it was empty
    raise NotADirectoryError(errno.ENOTDIR, "its folder cannot be created")


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if path.exists():  # not atomic: of two writers at the same instant the later one wins
            raise FileExistsError(path) from error
        os.replace(temporary, path)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, _MISSING):
        raise error


class LocalStore:
    """A store in a folder, which is created by the first write."""

    def __init__(self, root: Path) -> None:
        """Use the folder ``root``."""
        self._root = root.absolute()
        self.uri = str(self._root)

    def read_bytes(self, key: str) -> bytes:
        """See ``Store``."""
        path = self._file(key)
        with local_errors(path):
            return path.read_bytes()

    def write_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """See ``Store``."""
        if if_absent and self.exists(key):
            return False
        try:
            with replacing(self._at(key), if_absent=if_absent) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            return False
        return True

    def exists(self, key: str) -> bool:
        """See ``Store``."""
        path = self._at(key)
        with local_errors(path):
            return path.is_file()

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ``Store``."""
        return (file.key for file in self.stored(prefix))

    def stored(self, prefix: str = "") -> Iterator[StoredFile]:
        """See ``Store``."""
        return self._walk(prefix, temporary=False)

    def unfinished(self, prefix: str = "") -> Iterator[StoredFile]:
        """See ``Store``; the key is that of the temporary file."""
        return self._walk(prefix, temporary=True)

    def discard(self, unfinished: StoredFile) -> None:
        """See ``Store``."""
        self.delete(unfinished.key)

    def delete(self, key: str) -> None:
        """See ``Store``; folders that are empty then go too."""
        path = self._at(key)
        with local_errors(path), contextlib.suppress(*_MISSING):
            path.unlink()
        with contextlib.suppress(OSError):
            while (path := path.parent) != self._root:
                path.rmdir()

    def upload(self, path: Path, key: str, *, if_absent: bool = False) -> str | None:
        """See ``Store``; no hard link, as writing to ``path`` later must not change the stored file."""
        if if_absent and self.exists(key):
            return None
        try:
            with replacing(self._at(key), if_absent=if_absent) as temporary:
                return copy_hashed(path, temporary)
        except FileExistsError:
            return None

    def download(self, key: str, path: Path) -> str:
        """See ``Store``."""
        source = self._file(key)
        with local_errors(path):
            return copy_hashed(source, path)

    def sha256(self, key: str) -> str | None:
        """See ``Store``."""
        path = self._at(key)
        with local_errors(path):
            return file_sha256(path) if path.is_file() else None

    def local_path(self, key: str) -> Path:
        """See ``Store``."""
        return self._at(key) if key else self._root

    def _walk(self, prefix: str, *, temporary: bool) -> Iterator[StoredFile]:
        folder = self.local_path(prefix.rpartition("/")[0])
        with local_errors(folder):
            walk = os.walk(folder, onerror=_raise_unless_missing)
            paths = [
                Path(place, name)
                for place, _, names in walk
                for name in names
                if is_temporary(name) == temporary
            ]
        keys = {path.relative_to(self._root).as_posix(): path for path in paths}
        for key in sorted(key for key in keys if key.startswith(prefix)):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                stat = keys[key].lstat()
                yield StoredFile(key=key, size=stat.st_size, modified_s=stat.st_mtime)

    def _at(self, key: str) -> Path:
        check_key(key)
        return self._root / key

    def _file(self, key: str) -> Path:
        if not self.exists(key):
            raise FileNotFoundError(join_uri(self.uri, key))
        return self._at(key)
