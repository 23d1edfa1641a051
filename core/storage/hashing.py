"""Sha256 of files, computed while their bytes pass by on the way to somewhere else."""

import hashlib
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


class HashedStream:
    """A file that is read or written once, from front to back, and hashed meanwhile.

    It cannot seek: boto3's transfer manager then asks for its parts in order, and still moves several at a
    time.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Wrap an open file, at its start."""
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes; all that are left if it is negative."""
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def write(self, data: bytes) -> int:
        """Write ``data``."""
        self._hash.update(data)
        return self._file.write(data)

    def seekable(self) -> bool:
        """Return False."""
        return False

    @property
    def sha256(self) -> str:
        """The sha256 of what has passed by, in hexadecimal."""
        return self._hash.hexdigest()


def copy_hashed(source: Path, target: Path) -> str:
    """Copy the content of a file; return its sha256 in hexadecimal."""
    with source.open("rb") as opened, target.open("wb") as written:
        stream = HashedStream(opened)
        while chunk := stream.read(_CHUNK_BYTES):
            written.write(chunk)
    return stream.sha256


def file_sha256(path: Path) -> str:
    """Return the sha256 of the file ``path`` in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
