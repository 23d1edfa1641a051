"""Files of tokens: safetensors, which get their final names once they are complete."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import StorageError

_DTYPES = {np.int32: "I32", np.uint8: "U8"}


def save_sequences(path: Path, rows: Sequence[NDArray[np.int32]]) -> None:
    """Write rows of equal length as ``input_ids``.

    Raises:
        StorageError: If the file cannot be written.
    """
    with writing_rows(path, {"input_ids": np.int32}, (len(rows), len(rows[0]))) as write:
        for row in rows:
            write([row])


@contextmanager
def writing_rows(
    path: Path, columns: Mapping[str, Any], shape: tuple[int, int]
) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Write a file of (S, T) tensors row by row, so that memory holds none of them.

    Args:
        path: The file; its folder is made.
        columns: Name and number format of each tensor, the wider formats first.
        shape: (S, T) of each.

    Yields:
        A function that takes the next row of each tensor. It is to be called S times.

    Raises:
        StorageError: If the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    header, places, size = {}, [], 0
    for name, dtype in columns.items():
        begin, width = size, shape[1] * np.dtype(dtype).itemsize
        size += shape[0] * width
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (begin, size)}
        places.append((begin, width))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers lie at multiples of their size
    start, number = 8 + len(text), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + size)

            def write(row: Sequence[Any]) -> None:
                nonlocal number
                for (begin, width), values in zip(places, row, strict=False):
                    file.seek(start + begin + number * width)
                    file.write(values.tobytes())
                number += 1

            yield write
        assert number == shape[0], "else rows of zeros would be trained on"
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}). Free space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
