"""The parts of a training state that ranks have written, put together.

They are safetensors files of torch.distributed.checkpoint, which say where in its tensor each part belongs.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from core.errors import CheckpointError
from core.storage.interface import local_errors
from core.training.state import STATE, in_shards, shard_name
from core.untrusted import foreign_errors, parse_object

_PARTS = "shard-*.safetensors"  # torch's name for them


def merged(folders: Sequence[Path], to: Path) -> Path:
    """Put the parts of a state that ranks have written together, in the files that one process writes.

    Args:
        folders: The state, and what other nodes have published of it; they may be the store's own folders
            and stay as they are.
        to: Where the files go.

    Returns:
        The folder of the state to use: that of a state by one process is the first one.

    Raises:
        CheckpointError: If the parts do not make whole tensors.
    """
    directory = folders[0]
    parts = sorted(path for folder in folders for path in folder.glob(_PARTS))
    if not parts:
        return directory
    places: dict[str, list[tuple[tuple[int, ...], Path]]] = {}
    with foreign_errors(lambda said: CheckpointError(f"{directory} holds no whole state: {said}.")):
        for folder in folders:
            stored = HuggingFaceStorageReader(str(folder)).read_metadata().storage_data
            for index, info in stored.items():
                places.setdefault(index.fqn, []).append((tuple(index.offset or ()), Path(info.relative_path)))
        files = {path: safe_open(path, framework="pt") for path in parts}

    def wholes() -> Iterator[tuple[str, Tensor]]:
        for name, found in sorted(places.items()):
            yield name, _whole(name, [(offset, files[path].get_tensor(name)) for offset, path in found])

    content = parse_object((directory / STATE).read_bytes())
    with local_errors(to):
        to.mkdir(parents=True)
        for number, shard in enumerate(in_shards(wholes()), start=1):
            save_file(shard, to / shard_name(number))
        (to / STATE).write_text(json.dumps(content | {"shards": number}))
    return to


def _whole(name: str, parts: list[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Put a tensor together from its parts, each with the place of its first element."""
    ends = [[o + s for o, s in zip(offset, part.shape, strict=True)] for offset, part in parts]
    whole = torch.empty([max(sizes) for sizes in zip(*ends, strict=True)], dtype=parts[0][1].dtype)
    for (offset, part), end in zip(parts, ends, strict=True):
        whole[tuple(slice(*span) for span in zip(offset, end, strict=True))] = part
    if sum(part.numel() for _, part in parts) != whole.numel():
        raise CheckpointError(f"parts of {name} are missing in a training state, or there twice.")
    return whole
