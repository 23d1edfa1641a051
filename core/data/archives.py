"""Compressed data files: their unpacked size is checked before a library writes them to disk."""

import bz2
import gzip
import lzma
import shutil
import tarfile
from pathlib import Path
from typing import Any

from core.errors import DataError

_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
_ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x04\x22\x4d\x18")
_MAX_RATIO = 200
"""Texts compress 20x at best."""
_FREE_BYTES = 10_000_000
"""Too small for the ratio to matter."""
_CHUNK_BYTES = 2**20


def check_compressed(file: Path) -> None:
    """Raise a ``DataError`` if a file is not what its name says, or unpacks to hundreds of times its size.

    The ``datasets`` library goes by the content: it unpacks an archive under any name, of any size.
    """
    with file.open("rb") as opened:
        start = opened.read(8)
    kind = next((suffix for suffix, magic in _MAGIC.items() if start.startswith(magic)), "")
    expected = file.suffix if file.suffix in _MAGIC else ""
    if kind != expected or start.startswith(_ARCHIVES) or (not kind and tarfile.is_tarfile(file)):
        raise DataError(
            f"{file} is compressed or archived in another way than its name says. If you trust its source, "
            "unpack it, and name what is in it."
        )
    if not kind:
        return
    limit = max(_FREE_BYTES, _MAX_RATIO * file.stat().st_size)
    unpacked = 0
    try:
        with _opener(kind)(file, "rb") as stream:
            while unpacked <= limit and (chunk := stream.read(_CHUNK_BYTES)):
                unpacked += len(chunk)
    except (OSError, EOFError, lzma.LZMAError, ValueError, ImportError):
        return  # the library reports it
    if unpacked > limit:
        raise DataError(
            f"{file} unpacks to more than {_MAX_RATIO} times its size, as if made to fill the disk. Unpack "
            "it yourself if you trust it."
        )


def unpacked(file: Path, folder: Path) -> Path:
    """Return a file as it is, or, if it is compressed, unpacked in a folder."""
    if file.suffix not in _MAGIC:
        return file
    target = folder / f"{len(list(folder.iterdir()))}{Path(file.stem).suffix}"
    with _opener(file.suffix)(file, "rb") as stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out, _CHUNK_BYTES)
    return target


def _opener(kind: str) -> Any:
    if kind == ".zst":
        import zstandard

        return zstandard.open
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[kind]
