"""The place between two rows of a mixture at which packing was interrupted, as a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.data.drawing import Drawn, Seen
from core.data.packing import Tokenized


@dataclass(frozen=True, kw_only=True)
class Position:
    """All that decides the rows to come, beside the sources themselves."""

    rows: int
    """Rows packed so far."""
    padding: int
    """Tokens of padding in them."""
    source_rows: tuple[int, ...]
    """Rows of each source: files that have other numbers now are other files."""
    drawn: tuple[Drawn, ...]
    """How far each source is drawn."""
    waiting: tuple[Tokenized, ...]
    """Pieces that wait for a row."""
    unread: tuple[Tokenized, ...]
    """Pieces of the last document that do not wait yet."""

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        from safetensors.numpy import save_file

        pieces = [*self.waiting, *self.unread]
        tensors = {
            "lengths": np.array([len(piece.ids) for piece in pieces], np.int64),
            "divisible": np.array([piece.divisible for piece in pieces], np.uint8),
            "ids": _joined([piece.ids for piece in pieces], np.int32),
            "trained": _joined([piece.trained for piece in pieces], np.uint8),
        }
        tensors |= {f"seen.{n}": drawn.seen.digests() for n, drawn in enumerate(self.drawn)}
        numbers = {
            "rows": self.rows,
            "padding": self.padding,
            "waiting": len(self.waiting),
            "source_rows": self.source_rows,
            "drawn": [drawn.numbers() for drawn in self.drawn],
        }
        save_file(tensors, path, {"position": json.dumps(numbers)})

    @classmethod
    def load(cls, path: Path) -> "Position":
        """Read what ``save`` wrote."""
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            numbers = json.loads(file.metadata()["position"])
            ends = np.cumsum(file.get_tensor("lengths"))[:-1]
            columns = [np.split(file.get_tensor(name), ends) for name in ("ids", "trained")]
            pieces = [
                Tokenized(ids, trained, bool(divisible))
                for ids, trained, divisible in zip(*columns, file.get_tensor("divisible"), strict=False)
            ]
            drawn = tuple(
                Drawn(**counts, seen=Seen(file.get_tensor(f"seen.{n}")))
                for n, counts in enumerate(numbers["drawn"])
            )
        return cls(
            rows=numbers["rows"],
            padding=numbers["padding"],
            source_rows=tuple(numbers["source_rows"]),
            drawn=drawn,
            waiting=tuple(pieces[: numbers["waiting"]]),
            unread=tuple(pieces[numbers["waiting"] :]),
        )


def _joined(arrays: Sequence[Any], dtype: Any) -> Any:
    return np.concatenate([np.empty(0, dtype), *arrays])
