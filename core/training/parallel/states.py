"""Training states of several ranks: each writes its part, rank 0 publishes, and any number of ranks resumes.

Each node publishes what its ranks have written, below the state that rank 0 publishes last, which names them.
torch.distributed.checkpoint writes the parts. Whoever resumes puts them together: ``parts.py``.
"""

import contextlib
import functools
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
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
from core.storage.interface import join_uri, local_errors
from core.storage.publication import publish
from core.training.parallel.nodes import Place
from core.training.resume import state_name
from core.training.state import in_shards, shard_name, state_bytes, state_tensors, write_progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from core.training.resume import SavedStates
    from core.training.state import TrainingProgress

log = logging.getLogger(__name__)

_ALONE = Place()
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

    def __init__(
        self, states: "SavedStates | None", folder: Path, *, place: Place = _ALONE, uri: str = ""
    ) -> None:
        """Make process groups of its own for what is written while training continues; all ranks do so.

        Args:
            states: On rank 0, where they are published; None on the others.
            folder: Holds one state, or a node's part of it; the same on all ranks of a node.
            place: This node; the first rank of each but the first publishes what that has written.
            uri: Where states are, for that.
        """
        self._states, self._folder, self._place, self._uri = states, folder, place, uri
        self._group = dist.new_group(backend="gloo")
        self._under_way: Future[Any] | None = None
        self._first_ones: Any = None
        if place.nodes > 1:
            size = dist.get_world_size() // place.nodes
            self._first_ones = dist.new_group([node * size for node in range(place.nodes)], backend="gloo")
            self._helps = place.node > 0 and dist.get_rank() % size == 0
            self._helper = ThreadPoolExecutor(1, "training-state")

    def __enter__(self) -> "RankStates":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being written, unless an error has ended the training: a rank may be gone then."""
        if self._under_way is not None and error[0] is None:
            self._under_way.exception()
        if self._first_ones is not None:
            self._helper.shutdown()

    def save(self, model: "PreTrainedModel", optimizer: "Optimizer", progress: "TrainingProgress") -> None:
        """Save the state if rank 0 finds that one is due; failures are logged there.

        It is copied to host memory when this returns, if that has room, and written and published while
        training continues. Otherwise it is written first.
        """
        decision = torch.tensor(self._decide(model, progress) if self._states is not None else _NO)
        dist.broadcast(decision, 0)
        if decision == _NO:
            return
        with contextlib.nullcontext() if self._states is None else self._states.pace.standstill():
            written = self._write(state_tensors(model, optimizer), bool(decision == _SAVE))
        if self._states is not None:
            progress = progress.snapshot()
            self._states.publish(progress, functools.partial(self._complete, written, progress))
        elif self._first_ones is not None and self._helps:
            self._helper.submit(self._publish_part, written, progress.next_step)

    def _write(self, state: "Iterable[tuple[str, Tensor]]", at_once: bool) -> "Future[Any]":
        """Write this rank's part of a state; with ``at_once``, what is returned may still be under way."""
        if self._under_way is not None:
            self._under_way.exception()
        tensors = dict(state)
        writer = HuggingFaceStorageWriter(
            str(self._folder), fqn_to_index_mapping=_files(tensors), save_distributed=True
        )
        tensors = _share(tensors)
        saved: dict[str, Any] = {"storage_writer": writer, "process_group": self._group}
        if at_once:
            written = async_save(tensors, **saved)
            assert isinstance(written, Future)
        else:
            written = Future()
            try:
                written.set_result(save(tensors, **saved))
            except Exception as error:  # as async_save hands it on
                written.set_exception(error)
        self._under_way = written
        return written

    def _complete(self, written: "Future[Any]", progress: "TrainingProgress") -> None:
        """Wait for all ranks, and describe what they have written."""
        assert self._states is not None
        error = written.exception()
        if not self._all_have(error is None) and error is None:
            raise StorageError("another node has not stored its part.")
        if error is not None:
            raise full_disk(error) or StorageError(f"{self._folder} cannot be written: {error}.") from error
        parts = [self._part(node) for node in range(1, self._place.nodes)]
        write_progress(self._folder, progress, 0, self._states.belongs_to, parts)

    def _publish_part(self, written: "Future[Any]", step: int) -> None:
        """Publish what the ranks of this node have written; rank 0 then publishes the state."""
        try:
            written.result()
            publish(self._folder, join_uri(self._uri, state_name(step), self._part(self._place.node)))
        except Exception as error:  # no failure may end hours of training
            log.warning("this node's part of the training state of step %d is not stored: %s", step, error)
            self._all_have(False)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._all_have(True)

    def _all_have(self, mine: bool) -> bool:
        """Return whether the first ranks of all nodes say so."""
        if self._first_ones is None:
            return mine
        said = torch.tensor(int(mine))
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self._first_ones)
        return bool(said)

    def _part(self, node: int) -> str:
        return f"{self._place.meeting}-{node}"

    def _decide(self, model: "PreTrainedModel", progress: "TrainingProgress") -> int:
        assert self._states is not None
        size = state_bytes(model)
        if not self._states.start(progress, size):
            return _NO
        return _SAVE if size < 0.7 * available_bytes("cpu") else _SAVE_WAITING


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
