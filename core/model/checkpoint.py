"""Checkpoints on disk: Hugging Face folders, read and written one decoder layer at a time."""

import copy
import fnmatch
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import CheckpointError
from core.model.config import layer_shapes, load_config
from core.model.families import family_of
from core.model.remote_code import write_config
from core.untrusted import files_of, foreign_errors, parse_object, read_limited

INDEX = "model.safetensors.index.json"
PROVENANCE = "adapt_pruner.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that can run code when they are loaded."""

ChangeLayer = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
"""Takes the number of a decoder layer and its tensors by name within the layer; returns them changed."""

_CONVERT = (
    "convert it where its pickles are trusted, with transformers' from_pretrained and save_pretrained, or "
    "choose another revision."
)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LEGAL = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
"""Files that go with a model wherever it goes."""
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.tiktoken",
    *LEGAL,
)
"""Files beside the weights that a smaller model shares with its base."""


def is_companion(name: str) -> bool:
    """Return whether a file of a checkpoint's folder belongs to the tokenizer or another companion."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _COMPANIONS)


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: the name of each tensor to the file beside the index that holds it.

    Raises:
        CheckpointError: If it is damaged, or names something other than safetensors files.
    """
    try:
        shard_of = parse_object(read_limited(index))["weight_map"]
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise ValueError("its weight_map does not map names to file names")
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}. Fetch it again.") from error
    for shard in sorted(set(shard_of.values())):
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {shard[:100]}, which is not a safetensors file (pickles are never read). "
                f"{_CONVERT}"
            )
    return shard_of


def weight_files(directory: Path) -> set[str]:
    """Return the names of the files that weights are read from; others repeat them, as consolidated ones do.

    Raises:
        CheckpointError: If the index is damaged, or names something other than safetensors files.
    """
    if (directory / INDEX).is_file():
        return set(_weight_map(directory / INDEX).values())
    return {"model.safetensors"}


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    held = f"holds only pickles ({', '.join(pickles[:3])}), which can run code when they are loaded"
    problem = held if pickles else f"holds no model.safetensors or {INDEX}"
    advice = f"Give a checkpoint with safetensors weights (pickles are never read): {_CONVERT}"
    return f"{directory} {problem}. {advice}"


class Checkpoint:
    """A checkpoint's folder, opened once: its config is read and checked, the rest is read when asked for.

    Only ``config.json`` need be there until the weights are asked for.

    Attributes:
        directory: The folder.
        config: Its transformers config.
        family: Where the model's family keeps its groups.
        layers: Sizes of each decoder layer.
    """

    def __init__(self, directory: Path) -> None:
        """Read the config.

        Raises:
            CheckpointError: If there is none, or it cannot be read.
            UnsupportedModelError: If the model's family is not supported.
        """
        self.directory = directory
        self.config = load_config(directory)
        self.family = family_of(self.config)
        self.layers = layer_shapes(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of the first tensor, which stands for all."""
        with self.weights() as reader:
            return reader.tensor(reader.names()[0]).dtype

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the checkpoint was made; {} if unknown."""
        return read_json(self.directory / PROVENANCE)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Content of ``generation_config.json``; {} if there is none."""
        return read_json(self.directory / "generation_config.json")

    def weights(self) -> "CheckpointReader":
        """Open the weights."""
        return CheckpointReader(self.directory)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Read a decoder layer's tensors, by their names within the layer."""
        prefix = f"{self.family.layers}.{index}."
        with self.weights() as reader:
            names = [name for name in reader.names() if name.startswith(prefix)]
            return {name.removeprefix(prefix): reader.tensor(name) for name in names}

    def outside(self) -> dict[str, Tensor]:
        """Read the tensors outside the decoder layers, less an output head that is tied to the embedding."""
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        with self.weights() as reader:
            names = [n for n in reader.names() if not n.startswith(f"{self.family.layers}.")]
            return {name: reader.tensor(name) for name in names if name not in tied}

    def rewrite(
        self,
        target: Path,
        config: Any,
        *,
        change: ChangeLayer = lambda _, tensors: tensors,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        provenance: Mapping[str, Any],
        config_writer: Callable[[Any, Path], None] = write_config,
    ) -> None:
        """Write the checkpoint with other layers, holding no more than one of them at a time.

        Args:
            target: Folder of the new checkpoint.
            config: Describes it; see ``write_checkpoint``.
            change: Turns a layer's tensors into those to write.
            layers: Numbers of the layers to write; None for all.
            dtype: Number format to write; None keeps the stored one.
            provenance: See ``write_checkpoint``.
            config_writer: See ``write_checkpoint``.
        """
        written = range(len(self.layers)) if layers is None else layers

        def parts() -> Iterator[dict[str, Tensor]]:
            for place, index in enumerate(written):
                tensors = change(index, self.layer(index))
                yield {f"{self.family.layers}.{place}.{name}": t for name, t in tensors.items()}
            yield self.outside()

        write_checkpoint(
            target,
            config,
            ({name: t.to(dtype or t.dtype) for name, t in part.items()} for part in parts()),
            len(written) + 1,
            companions=self.directory,
            provenance=provenance,
            config_writer=config_writer,
        )


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
        self._shard_of: dict[str, str]
        if (directory / INDEX).is_file():
            self._shard_of = _weight_map(directory / INDEX)
        elif (directory / "model.safetensors").is_file():
            self._shard_of = dict.fromkeys(self._shard("model.safetensors").keys(), "model.safetensors")
        else:
            raise CheckpointError(_no_weights(directory))
        # Checkpoints of 2023 store rotary frequencies, which models now compute from the config.
        self._shard_of = {
            name: shard for name, shard in self._shard_of.items() if not name.endswith("rotary_emb.inv_freq")
        }
        if not self._shard_of:
            raise CheckpointError(
                f"{directory} holds no weights: its safetensors file is empty. Fetch it again."
            )

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
            with foreign_errors(
                lambda said: CheckpointError(
                    f"{path} is not a valid safetensors file ({said}). Fetch it again."
                )
            ):
                self._open[name] = self._files.enter_context(safe_open(path, framework="pt"))
        return self._open[name]

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shard_of)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: If its shard is missing or corrupt.
        """
        with self._errors(name):
            tensor: Tensor = self._shard(self._shard_of[name]).get_tensor(name)
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.directory / self._shard_of[name]}: {name} has the format {tensor.dtype}, but weights "
                "must be float64, float32, bfloat16 or float16. Give a checkpoint that is not quantized."
            )
        return tensor

    def shape(self, name: str) -> list[int]:
        """Return the shape of one tensor, which is not read.

        Raises:
            CheckpointError: If its shard is missing or corrupt.
        """
        with self._errors(name):
            return list(self._shard(self._shard_of[name]).get_slice(name).get_shape())

    def _errors(self, name: str) -> AbstractContextManager[None]:
        where = f"{self.directory / self._shard_of[name]}: {name}"
        return foreign_errors(
            lambda said: CheckpointError(f"{where} cannot be read ({said}). Fetch it again.")
        )


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
    """Write a checkpoint, one shard per part, holding no more than one part at a time.

    Args:
        directory: Where it goes; created if missing.
        config: The transformers config that describes it, or whatever ``config_writer`` takes.
        parts: Full tensor names to tensors: one part per decoder layer, then one with the rest.
        num_parts: Number of parts, which is part of the shards' names.
        companions: Folder of a checkpoint whose tokenizer, chat template and generation config are copied.
        provenance: How the checkpoint was made; written to ``adapt_pruner.json``.
        config_writer: Writes ``config.json``, and the code that it names, into a folder.
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
        for path in files_of(companions, is_companion):
            shutil.copyfile(path, directory / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file beside the weights; {} if there is no such file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        return parse_object(read_limited(path)) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a JSON object: {error}. Fetch it again, or remove it."
        ) from error


def save_model(
    model: Any, directory: Path, *, companions: Path | None, provenance: Mapping[str, Any]
) -> None:
    """Write a model in memory as a checkpoint; arguments as in ``write_checkpoint``.

    ``config.json`` gets the number format of the weights: the model's config may still name another.
    """
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    parts = model_parts(model)
    write_checkpoint(directory, config, parts, len(parts), companions=companions, provenance=provenance)


def model_parts(model: Any) -> list[dict[str, Tensor]]:
    """Return a model's tensors by name, less tied ones: of each decoder layer, then of the rest."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    parts = []
    for index in range(model.config.num_hidden_layers):
        prefix = f"{family_of(model.config).layers}.{index}."
        parts.append({name: rest.pop(name) for name in list(rest) if name.startswith(prefix)})
    return [*parts, rest]
