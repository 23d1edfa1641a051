"""The header of a GGUF file, read with limits before any library gets the file.

The libraries allocate what a header asks for. Here no count is believed that the rest of the file cannot
hold.
"""

import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NAME_BYTES, _MAX_TEXT_BYTES, _MAX_DIMENSIONS = 2**16, 2**24, 4
_MAX_ENTRIES, _MAX_TENSORS, _MAX_ITEMS = 10_000, 100_000, 2**23
_MAX_SIZES = {
    "block_count": 1000,
    "embedding_length": 2**18,
    "feed_forward_length": 2**21,
    "vocab_size": 2**23,
    "context_length": 2**40,
    "attention.head_count": 2**14,
    "attention.head_count_kv": 2**14,
    "attention.key_length": 2**14,
    "attention.value_length": 2**14,
    "rope.dimension_count": 2**14,
}
"""The largest value of each size, as in ``core.model.limits``; some may also be lists, by layer."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a header says that can be checked."""

    values: dict[str, Any] = field(default_factory=dict)
    """Metadata: numbers and texts; lists by their length alone."""
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name to shape, the fastest dimension first."""


class _Reader:
    """Reads little-endian values of a file, never beyond its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size

    def take(self, count: int, limit: int) -> bytes:
        if count > limit or count > self.left():
            raise ValueError(f"an entry of {count:,} bytes is longer than the file or its limit")
        return self._file.read(count)

    def skip(self, count: int) -> None:
        if count > self.left():
            raise ValueError(f"a list of {count:,} bytes is longer than the file")
        self._file.seek(count, 1)

    def left(self) -> int:
        return self.size - self._file.tell()

    def number(self, code: str) -> Any:
        length = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.take(length, 8))[0]

    def text(self, limit: int) -> str:
        return self.take(self.number("Q"), limit).decode()


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a header and check that the file holds what it says, and that sizes and tensors fit each other.

    Raises:
        CheckpointError: If the file is damaged, or not a GGUF file.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            header = _read(_Reader(file, path.stat().st_size))
        _check(header)
        return header
    except (ValueError, OSError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}. Fetch it again.") from error


def _read(reader: _Reader) -> GgufHeader:
    if reader.take(4, 4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := reader.number("I")) not in (2, 3):
        raise ValueError(f"its version is {version:,}, not 2 or 3")
    tensors, entries = reader.number("Q"), reader.number("Q")
    if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
        raise ValueError(f"it claims {tensors:,} tensors and {entries:,} entries")
    header = GgufHeader()
    for _ in range(entries):
        key = reader.text(_MAX_NAME_BYTES)
        if key in header.values:
            raise ValueError(f"{key[:100]} is there twice")
        header.values[key] = _value(reader, reader.number("I"))
    needed = 0
    for _ in range(tensors):
        name, dimensions = reader.text(_MAX_NAME_BYTES), reader.number("I")
        if name in header.tensors or not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name[:100]} is there twice, or of {dimensions:,} dimensions")
        header.tensors[name] = shape = tuple(reader.number("Q") for _ in range(dimensions))
        kind, offset = reader.number("I"), reader.number("Q")
        if 0 in shape:
            raise ValueError(f"tensor {name[:100]} is empty")
        needed = max(needed, offset + _bytes_of(kind, prod(shape), name))
    if needed > reader.left():
        raise ValueError(f"its tensors take {needed:,} bytes, but {reader.left():,} are there")
    return header


def _value(reader: _Reader, kind: int) -> Any:
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind])
    if kind == _STRING:
        return reader.text(_MAX_TEXT_BYTES)
    if kind != _ARRAY:
        raise ValueError(f"an entry is of the unknown type {kind:,}")
    kind, count = reader.number("I"), reader.number("Q")
    if count > _MAX_ITEMS:
        raise ValueError(f"a list claims {count:,} items")
    if kind in _SCALARS:
        reader.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
    elif kind == _STRING:
        for _ in range(count):
            reader.text(_MAX_TEXT_BYTES)
    else:
        raise ValueError(f"a list is of the unknown type {kind:,}")
    return [count]


def _bytes_of(kind: int, count: int, name: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name[:100]} is of the unknown format {kind:,}") from None
    return -(-count // block) * size


def _check(header: GgufHeader) -> None:
    """Compare the sizes of the metadata, by which a model is built, with the tensors."""
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it names no architecture")
    sizes = {name: header.values.get(f"{architecture}.{name}") for name in _MAX_SIZES}
    for name, limit in _MAX_SIZES.items():
        value = sizes[name]
        stated = value is not None and not isinstance(value, list)
        if stated and (type(value) is not int or not 0 < value <= limit):
            raise ValueError(f"{architecture}.{name}={str(value)[:40]} must be from 1 to {limit:,}")
    layers = len(
        {name.split(".")[1] for name in header.tensors if name.startswith("blk.") and "." in name[4:]}
    )
    if sizes["block_count"] != layers or not layers:
        raise ValueError(f"{architecture}.block_count={sizes['block_count']} but {layers:,} layers are there")
    embedding = header.tensors.get("token_embd.weight", ())
    if len(embedding) != 2 or embedding[0] != sizes["embedding_length"]:
        raise ValueError(f"token_embd.weight does not fit {architecture}.embedding_length")
    vocabulary = header.values.get("tokenizer.ggml.tokens")
    if isinstance(vocabulary, list) and vocabulary[0] > embedding[1]:
        raise ValueError("it has more tokens than rows of token_embd.weight")
