"""The state of a training between two optimizer steps: written to a folder, and restored bit for bit.

The learning rate and the position in the data follow from the step, so they are not part of it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from core.errors import CheckpointError, StorageError
from core.storage.interface import local_errors
from core.storage.layout import TRAINING_STATE
from core.training.optimizer import device_of_moments
from core.untrusted import parse_object

STATE = TRAINING_STATE

_PART = re.compile(r"[0-9a-f]{1,32}-[0-9]{1,4}")
_FORMAT = 1
_SHARD_BYTES = 2**28
_WEIGHT, _RNG = "weight", "rng"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a training has come."""

    losses: Sequence[tuple[int, float, float]] = ()
    """(global step, loss, learning rate) of each finished optimizer step."""
    trained_tokens: int = 0
    """Tokens that counted in the loss."""
    seconds: float = 0.0
    """Time these steps took, over all attempts."""
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Name of each other curve, such as ``gradient_norm``, to its (global step, value)."""

    @property
    def next_step(self) -> int:
        """The next global step."""
        return self.losses[-1][0] + 1

    def snapshot(self) -> "TrainingProgress":
        """Return a copy whose curves no longer grow."""
        series = {name: list(points) for name, points in self.series.items()}
        return replace(self, losses=list(self.losses), series=series)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A state on disk."""

    directory: Path
    """Holds ``state.json`` and the shards."""
    shards: int
    """Number of files with tensors."""
    progress: TrainingProgress
    """What has been done."""
    belongs_to: dict[str, Any]
    """The inputs of the training."""
    parts: tuple[str, ...] = ()
    """Names of what nodes other than the first have published of it."""


def write_state(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    progress: TrainingProgress,
    *,
    belongs_to: Mapping[str, str],
) -> TrainingState:
    """Write the state between two optimizer steps: 12 bytes per trained parameter.

    Args:
        directory: Where it goes; created if missing.
        tensors: Those of ``state_tensors``, or copies of them.
        progress: What has been done.
        belongs_to: The inputs of the training, such as the digest of its data.

    Returns:
        What has been written.

    Raises:
        StorageError: If the folder cannot be written.
    """
    shards = 0
    try:
        with local_errors(directory):
            directory.mkdir(parents=True)
            for number, shard in enumerate(in_shards(tensors), start=1):
                save_file(shard, directory / shard_name(number))
                shards = number
            write_progress(directory, progress, shards, belongs_to)
    except SafetensorError as error:
        raise StorageError(f"{directory} cannot be written: {error}. Free space.") from error
    return TrainingState(directory=directory, shards=shards, progress=progress, belongs_to=dict(belongs_to))


def write_progress(
    directory: Path,
    progress: TrainingProgress,
    shards: int,
    belongs_to: Mapping[str, str],
    parts: Sequence[str] = (),
) -> None:
    """Write ``state.json``, the small part of a state."""
    content = {"format": _FORMAT, "shards": shards, "progress": asdict(progress), "parts": list(parts)}
    (directory / STATE).write_text(json.dumps(content | {"belongs_to": dict(belongs_to)}))


def trained_parameters(model: Module) -> dict[str, Parameter]:
    """Return the parameters that are trained, by name, tied ones once: those that require a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_tensors(model: Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state by their names in it; sharded ones as they are."""
    for name, parameter in trained_parameters(model).items():
        yield f"{_WEIGHT}.{name}", parameter.detach()
        moments = optimizer.state.get(parameter, {})
        yield from ((f"{moment}.{name}", moments[moment]) for moment in MOMENTS if moment in moments)
    yield from ((f"{_RNG}.{name}", state) for name, state in _random_states(model).items())


def state_bytes(model: Module) -> int:
    """Return the size of a state: a weight and two moments of four bytes for each trained parameter."""
    return 12 * sum(parameter.numel() for parameter in trained_parameters(model).values())


def drained(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, and let go of each."""
    while tensors:
        name = next(iter(tensors))
        yield name, tensors.pop(name)


def _random_states(model: Module) -> dict[str, Tensor]:
    states, device = {"cpu": torch.get_rng_state()}, _device_of(model)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _device_of(model: Module) -> torch.device:
    return next(model.parameters()).device


def in_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group tensors into shards of limited size; only one shard at a time is copied off the device."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield shard


def shard_name(number: int) -> str:
    """Return the name of a file with tensors, of which the first has the number 1."""
    return f"state-{number:05d}.safetensors"


def read_state(directory: Path) -> TrainingState:
    """Read the small part of a state, ``state.json``.

    Raises:
        CheckpointError: If it is not what ``write_state`` writes.
    """
    path = directory / STATE
    try:
        data = parse_object(path.read_bytes())
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']}, not {_FORMAT}")
        progress = data["progress"]
        losses = [(int(step), float(loss), float(rate)) for step, loss, rate in progress["losses"]]
        if not losses or any(step != losses[0][0] + i for i, (step, *_) in enumerate(losses)):
            raise ValueError("its steps are not consecutive")
        parts = tuple(map(str, data.get("parts", ())))  # earlier versions had one node
        if not all(map(_PART.fullmatch, parts)):
            raise ValueError("its parts have no names of parts")
        return TrainingState(
            directory=directory,
            parts=parts,
            shards=int(data["shards"]),
            progress=TrainingProgress(
                losses=losses,
                trained_tokens=int(progress["trained_tokens"]),
                seconds=float(progress["seconds"]),
                # Earlier versions kept losses alone.
                series={
                    name: [(int(step), float(value)) for step, value in points]
                    for name, points in progress.get("series", {}).items()
                },
            ),
            belongs_to=dict(data["belongs_to"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path} is not a training state: {error}.") from error


def check_fits(state: TrainingState, model: Module) -> None:
    """Check that a state holds exactly the tensors of the model's training, by name, shape and number format.

    Raises:
        CheckpointError: If it does not, or a shard cannot be read.
    """
    wanted = {f"{_RNG}.{name}": _like(random) for name, random in _random_states(model).items()}
    for name, parameter in trained_parameters(model).items():
        like = _like(parameter)
        wanted |= {f"{_WEIGHT}.{name}": like, f"exp_avg.{name}": like, f"exp_avg_sq.{name}": like}
        wanted[f"step.{name}"] = [], _DTYPES[torch.float32]
    found = {}
    for name, shard in _stored(state):
        tensor = shard.get_slice(name)
        found[name] = tensor.get_shape(), tensor.get_dtype()
    gpus_random = f"{_RNG}.cuda"
    if gpus_random not in wanted.keys() & found.keys():
        # Only one of the two has a GPU: the machine that saved, or this one.
        wanted.pop(gpus_random, None)
        found.pop(gpus_random, None)
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        raise CheckpointError(
            f"{state.directory} is a state of another model: {', '.join(differing[:3])} differ."
        )


def restore_state(state: TrainingState, model: Module, optimizer: Optimizer) -> TrainingProgress:
    """Load a state that ``check_fits`` has accepted into a model and its optimizer, one tensor at a time.

    Returns:
        What has been done.
    """
    parameters = dict(model.named_parameters())
    for key, shard in _stored(state):
        kind, _, name = key.partition(".")
        tensor = shard.get_tensor(key)
        if kind == _WEIGHT:
            parameters[name].detach().copy_(_part_of(tensor, parameters[name]))
        elif kind in MOMENTS:
            # A copy, as the file will be removed.
            parameter = parameters[name]
            device = parameter.device if kind == "step" else device_of_moments(optimizer, parameter)
            optimizer.state[parameter][kind] = _part_of(tensor.to(device, copy=True), parameter)
        elif name == "cpu":
            torch.set_rng_state(tensor)
        elif _device_of(model).type == "cuda":
            torch.cuda.set_rng_state(tensor, _device_of(model))
    return state.progress


def _part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return what a rank holds of a tensor that all have whole, if the parameter is sharded over ranks."""
    if not isinstance(parameter, DTensor) or not tensor.dim():  # a count of steps has none
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _like(tensor: Tensor) -> tuple[list[int], str]:
    return list(tensor.shape), _DTYPES[tensor.dtype]


def _stored(state: TrainingState) -> Iterator[tuple[str, Any]]:
    """Yield the name of each tensor with the open file that holds it."""
    for number in range(1, state.shards + 1):
        path = state.directory / shard_name(number)
        try:
            with safe_open(path, framework="pt") as shard:
                names = shard.keys()
                yield from ((name, shard) for name in names)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
