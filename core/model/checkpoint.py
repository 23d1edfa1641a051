"""Checkpoints on disk: a Hugging Face directory, read and written one decoder layer at a time."""

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import CheckpointError
from core.model.families import family_of
from core.model.remote_code import write_config

INDEX = "model.safetensors.index.json"
PROVENANCE = "adapt_pruner.json"

_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.tiktoken",
    "LICENSE*",
)
"""Files beside the weights that a smaller model shares with its base."""


def is_companion(name: str) -> bool:
    """Return whether a file of a checkpoint's folder belongs to the tokenizer or another companion."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _COMPANIONS)


class CheckpointReader:
    """Reads tensors of a safetensors checkpoint by name, without holding the others in memory."""

    def __init__(self, directory: Path) -> None:
        """Find the shards in ``directory``.

        Raises:
            CheckpointError: If there are none, one is missing, or the index cannot be read.
        """
        self.directory = directory
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        if (directory / INDEX).is_file():
            try:
                self._shard_of: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{directory / INDEX} is not a safetensors index. Fetch it again."
                ) from error
        elif (directory / "model.safetensors").is_file():
            self._shard_of = dict.fromkeys(self._shard("model.safetensors").keys(), "model.safetensors")
        else:
            raise CheckpointError(
                f"{directory} holds no model.safetensors or {INDEX}. "
                "Give a Hugging Face checkpoint with safetensors weights (pickles are never read)."
            )
        # Checkpoints of 2023 store rotary frequencies, which models now compute from the config.
        self._shard_of = {
            name: shard for name, shard in self._shard_of.items() if not name.endswith("rotary_emb.inv_freq")
        }

    def __enter__(self) -> "CheckpointReader":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all shards."""
        self._files.close()

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(
                    f"{path} is missing, but the index names it. Fetch the checkpoint again."
                )
            try:
                self._open[name] = self._files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a valid safetensors file ({error}). Fetch it again."
                ) from error
        return self._open[name]

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shard_of)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: If its shard is missing or corrupt.
        """
        shard = self._shard_of[name]
        try:
            return self._shard(shard).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.directory / shard}: {name} cannot be read ({error}). Fetch it again."
            ) from error

    def dtype(self) -> torch.dtype:
        """Return the number format of the first tensor, which stands for all."""
        return self.tensor(next(iter(self._shard_of))).dtype

    def layer(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose names start with ``prefix.``, under the rest of their names."""
        start = f"{prefix}."
        return {name[len(start) :]: self.tensor(name) for name in self._shard_of if name.startswith(start)}


def write_checkpoint(
    directory: Path,
    config: Any,
    parts: Iterable[Mapping[str, Tensor]],
    num_parts: int,
    *,
    companions: Path | None,
    provenance: Mapping[str, Any],
    config_writer: Callable[[Any, Path], None] = write_config,
) -> None:
    """Write a checkpoint, one shard a part, holding no more than one part at a time.

    Args:
        directory: Where it goes; created if missing.
        config: The transformers config that describes it, or what ``config_writer`` takes for one.
        parts: Full tensor names to tensors: one part a decoder layer, then one with the rest.
        num_parts: How many parts there are (shards carry it in their names).
        companions: Checkpoint whose tokenizer, chat template and generation config are copied along.
        provenance: What is known of the checkpoint's making; written to ``adapt_pruner.json``.
        config_writer: Writes ``config.json`` and the code that it names into a folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, part in enumerate(parts, start=1):
        shard = f"model-{number:05d}-of-{num_parts:05d}.safetensors"
        save_file(
            {name: t.contiguous() for name, t in part.items()}, directory / shard, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(part, shard)
        total_bytes += sum(t.numel() * t.element_size() for t in part.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=1))
    config_writer(config, directory)
    (directory / PROVENANCE).write_text(json.dumps(provenance, indent=1))
    if companions is not None:
        for path in companions.iterdir():
            if path.is_file() and is_companion(path.name):
                shutil.copyfile(path, directory / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that lies beside the weights; {} if there is no such file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is not a JSON object. Fetch it again, or remove it.") from error


def save_model(
    model: Any, directory: Path, *, companions: Path | None, provenance: Mapping[str, Any]
) -> None:
    """Write a model in memory as a checkpoint; arguments as in ``write_checkpoint``."""
    family = family_of(model.config)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    parts = []
    for index in range(model.config.num_hidden_layers):
        prefix = f"{family.layers}.{index}."
        parts.append({name: rest.pop(name) for name in list(rest) if name.startswith(prefix)})
    write_checkpoint(
        directory, model.config, [*parts, rest], len(parts) + 1, companions=companions, provenance=provenance
    )
