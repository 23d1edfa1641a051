"""The optimizer's moments at the end of a phase, in files, and their way into the next one's optimizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from core.errors import CheckpointError, StorageError
from core.storage.interface import local_errors
from core.training.optimizer import device_of_moments
from core.training.state import MOMENTS, in_shards

_FORMAT = "1"
_OTHERS = "the optimizer's moments are those of another model"
_AGAIN = "Remove the moments of the phase before and start the run again: it computes them again."


def write_moments(directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Write AdamW's moments of all parameters, tied ones once: 8 bytes a parameter.

    Args:
        directory: Where they go; created if missing.
        model: Its parameters name them.
        optimizer: AdamW over them, which has taken a step.

    Raises:
        StorageError: If the folder cannot be written.
    """
    tensors = (
        (f"{moment}.{name}", optimizer.state[parameter][moment])
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    )
    try:
        with local_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for number, shard in enumerate(in_shards(tensors), start=1):
                save_file(
                    shard, directory / f"moments-{number:05d}.safetensors", metadata={"format": _FORMAT}
                )
    except SafetensorError as error:
        raise StorageError(f"{directory} cannot be written: {error}. Free space.") from error


class StoredMoments(Mapping[str, Tensor]):
    """The moments in a folder, ``exp_avg.NAME`` and so on; each is read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Look at what ``write_moments`` has written.

        Raises:
            CheckpointError: If a file cannot be read, or is of another format.
        """
        self._places: dict[str, Path] = {}
        for path in sorted(directory.glob("moments-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as shard:
                    found = (shard.metadata() or {}).get("format")
                    self._places |= dict.fromkeys(shard.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}.") from error
            if found != _FORMAT:
                raise CheckpointError(f"{path} is of format {found!r}, not {_FORMAT}: use a newer version.")

    def __getitem__(self, name: str) -> Tensor:
        """Read one."""
        with safe_open(self._places[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)


Cut = Callable[[list[str], Callable[[str], Tensor]], Iterable[tuple[str, str, Tensor]]]
"""Gets names of parameters and what reads the tensor of one; gives name afterwards, name before, and what is
left of each tensor."""


def load_moments(
    stored: Mapping[str, Tensor], cut: Cut, model: PreTrainedModel, optimizer: Optimizer
) -> None:
    """Give an optimizer the moments of the model that its own was cut from.

    Parameters that were added by the cut start with none.

    Args:
        stored: The moments of the model before the cut.
        cut: The cut, as its weights were.
        model: After the cut.
        optimizer: AdamW over its parameters, before its first step.

    Raises:
        CheckpointError: If the moments are not those of the model.
    """
    parameters = dict(model.named_parameters())
    names = [name.removeprefix("step.") for name in stored if name.startswith("step.")]

    def reader_of(moment: str) -> Callable[[str], Tensor]:
        return lambda name: stored[f"{moment}.{name}"]

    for moment in ("exp_avg", "exp_avg_sq"):
        found = set()
        for name, before, tensor in cut(names, reader_of(moment)):
            found.add(name)
            parameter = parameters.get(name)
            if parameter is None or tensor.shape != parameter.shape:
                raise CheckpointError(f"{_OTHERS}: {name} differs. {_AGAIN}")
            if before:
                state = optimizer.state[parameter]
                device = device_of_moments(optimizer, parameter)
                state[moment] = tensor.to(device, parameter.dtype, copy=True)
                state["step"] = stored[f"step.{before}"].to(parameter.device, copy=True)
        if lacking := sorted(parameters.keys() - found):
            raise CheckpointError(f"{_OTHERS}: {', '.join(lacking[:3])} are not there. {_AGAIN}")
