"""What a publication holds: its files by size and sha256, and the JSON that lists them."""

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import IntegrityError, StorageError
from core.storage.hashing import file_sha256
from core.storage.interface import check_key, join_uri, local_errors
from core.storage.layout import way_back
from core.untrusted import decode

FORMAT = 1
"""Of ``MANIFEST.json``."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a publication."""

    path: str
    """Relative to the directory, with slashes."""
    size: int
    """Bytes."""
    sha256: str
    """Of the content, in hexadecimal."""

    @classmethod
    def of(cls, directory: Path, path: str) -> "FileEntry":
        """Describe the file ``path`` of ``directory``, which is read once."""
        file = directory / path
        with local_errors(file):
            return cls(path=path, size=file.stat().st_size, sha256=file_sha256(file))

    def fault_of(self, file: Path) -> str:
        """Return how ``file`` differs from this entry; "" if it does not."""
        with local_errors(file):
            if not file.is_file():
                return "a file expected, something else found" if file.exists() else "it is missing"
            size = file.stat().st_size
            return self.fault(size, file_sha256(file) if size == self.size else "")

    def fault(self, size: int, sha256: str) -> str:
        """Return how a file of ``size`` bytes with this sha256 differs from this entry; "" if it does not."""
        if size != self.size:
            return f"{self.size} bytes expected, {size} found"
        return "" if sha256 == self.sha256 else f"sha256 {self.sha256} expected, {sha256} found"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``MANIFEST.json`` says."""

    files: tuple[FileEntry, ...]
    """Sorted by path."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever the publisher says about the files; JSON-able."""
    folder: str = ""
    """Where the files are stored: beside the manifest, or in this folder beside it."""

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of the list of files: equal for equal content, wherever it is stored."""
        entries = [[entry.path, entry.size, entry.sha256] for entry in self.files]
        return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """The size of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def paths(self) -> list[str]:
        """The paths of all files."""
        return [entry.path for entry in self.files]

    def key(self, entry: FileEntry) -> str:
        """Return the key of a file below the publication's URI."""
        return join_uri(self.folder, entry.path) if self.folder else entry.path

    def to_json(self) -> str:
        """Return the content of ``MANIFEST.json``."""
        data = {"format": FORMAT, "digest": self.digest, **dataclasses.asdict(self)}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "MANIFEST.json") -> "Manifest":
        """Read ``MANIFEST.json``; nothing in it is trusted.

        Args:
            text: The JSON.
            where: The manifest's name in errors.

        Raises:
            FormatError: If a newer version has written it.
            IntegrityError: If it is not a manifest, was edited, or names a path outside of its directory.
        """
        advice = way_back(where)
        read = functools.partial(
            decode, content=text, where=where, advice=advice, newest=FORMAT, error=IntegrityError
        )
        manifest, digest = read(cls), read(_Digest).digest
        if problem := manifest._problem(digest):
            raise IntegrityError(f"{where} is damaged: {problem}. {advice}")
        return manifest

    def _problem(self, digest: str) -> str:
        """Return what is wrong with the list of files, or with its stored ``digest``; "" if nothing."""
        for entry in self.files:
            try:
                check_key(self.key(entry))
            except StorageError as error:
                return str(error).rstrip(".")
            if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                return f"{entry.path} lacks a sha256"
        return "" if digest == self.digest else "its digest does not fit its list of files"


@dataclass(frozen=True)
class _Digest:
    digest: str
