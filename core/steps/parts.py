"""Packed rows in the store while prepare-data works: a task that was killed goes on after the last ones.

Each part is a publication, numbered from 1: the rows that came since the one before, and the position behind
them.
"""

import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import FormatError, IntegrityError, StorageError
from core.storage.interface import join_uri
from core.storage.publication import Publication, find_publication, publish
from core.training.resume import remove_states

if TYPE_CHECKING:
    from core.data.position import Position

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the parts; those of another version are not used."""

_EVERY_S = 300.0
_MOST_BYTES = 2**28
_ROWS, _POSITION = "rows.bin", "position.safetensors"


class SavedParts:
    """See ``core.data.mixture.Parts``."""

    def __init__(
        self, uri: str, folder: Path, *, every_s: float = _EVERY_S, most_bytes: int = _MOST_BYTES
    ) -> None:
        """Use a place in the store.

        Args:
            uri: Holds only parts of this preparation.
            folder: For files that are being written or read.
            every_s: How often a part is published.
            most_bytes: A part of that size is published at once.
        """
        self._uri, self._folder = uri, folder
        self._every_s, self._most_bytes = every_s, most_bytes
        self._parts: list[Publication] = []
        self._fetched: list[Path] = []
        self._size, self._last = 0, time.monotonic()

    def position(self) -> "Position | None":
        """Return the position behind the last part; None if there is none that is whole."""
        from core.data.position import Position

        try:
            for number in itertools.count(1):
                if (part := find_publication(self._place(number))) is None:
                    break
                if part.manifest.metadata.get("format") != FORMAT:
                    raise FormatError(f"{part.uri} is of another version.")
                self._parts.append(part)
                self._fetched.append(part.fetch(self._folder / f"fetched-{number}"))
        except (IntegrityError, FormatError) as error:
            log.warning("what an earlier attempt has packed is not used: %s", error)
            self.discard()
        return Position.load(self._fetched[-1] / _POSITION) if self._fetched else None

    def rows(self) -> Iterator[bytes]:
        """Return the rows of all parts, once; copies that were read are removed: slices take their space."""
        for part, folder in zip(self._parts, self._fetched, strict=True):
            with (folder / _ROWS).open("rb") as file:
                while row := file.read(int(part.manifest.metadata["row_bytes"])):
                    yield row
            if folder.parent == self._folder:  # not the store's own
                shutil.rmtree(folder)

    def discard(self) -> None:
        """Remove all parts."""
        remove_states(self._uri)
        self._parts, self._fetched = [], []

    def add(self, row: bytes) -> bool:
        """Write a row; return whether a part is due."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _ROWS).open("ab") as file:
            file.write(row)
        self._size, self._row_bytes = self._size + len(row), len(row)
        return self._size >= self._most_bytes or time.monotonic() - self._last >= self._every_s

    def keep(self, position: "Position") -> None:
        """Publish the rows that were added; a failure is logged: they come with the next part."""
        part = self._folder / "part"
        part.mkdir(exist_ok=True)
        (self._folder / _ROWS).rename(part / _ROWS)
        position.save(part / _POSITION)
        metadata = {"format": FORMAT, "row_bytes": self._row_bytes, "sequences": position.rows}
        place = self._place(len(self._parts) + 1)
        try:
            published = publish(part, place, metadata=metadata)
            if published.manifest.metadata.get("sequences") != position.rows:
                remove_states(place)  # it was published before, with fewer rows, but the answer was lost
                published = publish(part, place, metadata=metadata)
            self._parts.append(published)
        except StorageError as error:
            log.warning("%d sequences are packed, but not kept: %s", position.rows, error)
            (part / _ROWS).rename(self._folder / _ROWS)
        else:
            log.info("%d sequences are packed and kept", position.rows)
        shutil.rmtree(part)
        self._size, self._last = 0, time.monotonic()

    def _place(self, number: int) -> str:
        return join_uri(self._uri, f"{number:06d}")
