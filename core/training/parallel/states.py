"""Training states of several ranks: each writes its part, rank 0 publishes, and any number of ranks resumes.

torch.distributed.checkpoint writes the parts. Whoever resumes puts them together: ``parts.py``.
"""

import copy
import functools
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor

from core.errors import StorageError, full_disk
from core.machine.memory import available_bytes
from core.storage.interface import local_errors
from core.training.state import in_shards, shard_name, state_tensors, write_progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from core.training.resume import SavedStates
    from core.training.state import TrainingProgress

_PART_BYTES = 2**28
_NO, _SAVE, _SAVE_WAITING = range(3)


def write_whole(directory: Path, model: "PreTrainedModel", optimizer: "Optimizer", *, moments: bool) -> int:
    """Write the weights, and the moments if wanted, as one process does; all ranks call it, rank 0 writes.

    Returns:
        The number of files.
    """
    tensors = (
        (name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in state_tensors(model, optimizer)
        if moments or name.startswith("weight.")
    )
    if dist.get_rank():
        return sum(0 for _ in tensors)
    number = 0
    with local_errors(directory):
        directory.mkdir(parents=True)
        for number, shard in enumerate(in_shards(tensors), start=1):
            save_file(shard, directory / shard_name(number))
    return number


class RankStates:
    """Saves the states of a training by several ranks.

    The end of a ``with`` block waits for what is being written.
    """

    def __init__(self, states: "SavedStates | None", folder: Path) -> None:
        """Make a process group of its own for what is written while training continues; all ranks do so.

        Args:
            states: On rank 0, where they are published; None on the others.
            folder: Holds one state, the same on all ranks.
        """
        self._states, self._folder = states, folder
        self._group = dist.new_group(backend="gloo")
        self._under_way: Future[Any] | None = None

    def __enter__(self) -> "RankStates":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being written, unless an error has ended the training: a rank may be gone then."""
        if self._under_way is not None and error[0] is None:
            self._under_way.exception()

    def save(self, model: "PreTrainedModel", optimizer: "Optimizer", progress: "TrainingProgress") -> None:
        """Save the state if rank 0 finds that one is due; failures are logged there.

        It is copied to host memory when this returns, if that has room, and written and published while
        training continues. Otherwise it is written first.
        """
        decision = torch.tensor(self._decide(model, progress) if self._states is not None else _NO)
        dist.broadcast(decision, 0)
        if decision == _NO:
            return
        if self._under_way is not None:
            self._under_way.exception()
        tensors = dict(state_tensors(model, optimizer))
        writer = HuggingFaceStorageWriter(
            str(self._folder), fqn_to_index_mapping=_files(tensors), save_distributed=True
        )
        tensors = _share(tensors)
        saved: dict[str, Any] = {"storage_writer": writer, "process_group": self._group}
        if decision == _SAVE:
            written = async_save(tensors, **saved)
            assert isinstance(written, Future)
        else:
            written = Future()
            try:
                written.set_result(save(tensors, **saved))
            except Exception as error:  # as async_save hands it on
                written.set_exception(error)
        self._under_way = written
        if self._states is not None:
            progress = copy.deepcopy(progress)  # its lists grow
            self._states.publish(progress, functools.partial(self._complete, written, progress))

    def _complete(self, written: "Future[Any]", progress: "TrainingProgress") -> None:
        """Wait for all ranks, and describe what they have written."""
        assert self._states is not None
        try:
            written.result()
        except Exception as error:
            raise full_disk(error) or StorageError(f"{self._folder} cannot be written: {error}.") from error
        write_progress(self._folder, progress, 0, self._states.belongs_to)

    def _decide(self, model: "PreTrainedModel", progress: "TrainingProgress") -> int:
        assert self._states is not None
        if not self._states.start(progress):
            return _NO
        copied = 12 * sum(parameter.numel() for parameter in model.parameters())
        return _SAVE if copied < 0.7 * available_bytes("cpu") else _SAVE_WAITING


def _files(tensors: "Mapping[str, Tensor]") -> dict[str, int]:
    """Return the number of the file that each tensor goes to, on each rank: files have a limited size."""
    size, files = 0, {}
    for name, tensor in tensors.items():
        files[name] = 1 + size // (_PART_BYTES * dist.get_world_size())
        size += tensor.nbytes
    return files


def _share(tensors: "Mapping[str, Tensor]") -> dict[str, Tensor]:
    """Return what this rank writes: of tensors that all have whole, each is written, and copied, by one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return {
        name: tensor
        for number, (name, tensor) in enumerate(tensors.items())
        if isinstance(tensor, DTensor) or rank == (0 if name.startswith("rng.") else number % size)
    }
