"""What a store offers, and what all stores share: keys, URIs and the errors of local files.

A key is a relative path with slashes. What goes wrong is a ``StorageError`` of one line: what, where, what to
do. Reading a missing key is a ``FileNotFoundError``.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.errors import StorageError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a store, as a listing shows it."""

    key: str
    """Where it is; for an incomplete upload, where it was to be."""
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
