"""Opens stores; the store in a folder.

Writing is atomic: a reader finds the old bytes, the new ones or none.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from core.errors import StorageError
from core.storage.hashing import copy_hashed, file_sha256
from core.storage.interface import Store, StoredFile, check_key, is_temporary, join_uri, local_errors

_MISSING = (FileNotFoundError, NotADirectoryError)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


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
