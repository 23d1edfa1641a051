"""Training states in the store: published while training continues, found by the next attempt.

Each is a publication named by its step, so it is either there whole and verified or not at all. The last one
stays until a newer one is published.
"""

import functools
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import AdaptPrunerError, CheckpointError, IntegrityError, StorageError
from core.machine.memory import spare_bytes
from core.quantities import Interval
from core.storage.interface import join_uri
from core.storage.publication import MANIFEST, find_publication, open_publication, publish
from core.storage.store import open_store
from core.training.pace import Pace

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from core.training.state import TrainingProgress, TrainingState

log = logging.getLogger(__name__)

_NOT_SAVED = (
    "the training state of step %d is not saved: %s Training continues; the next one is tried as usual."
)

_MOST_OF_MEMORY = 0.7
"""Share of the memory that training leaves free, for the copy of a state."""


class SavedStates:
    """The states of one training: their place in the store, and a thread that publishes them.

    The end of a ``with`` block waits for the state being published.
    """

    def __init__(
        self, uri: str, folder: Path, *, every: Interval | None, belongs_to: Mapping[str, str]
    ) -> None:
        """Use the place ``uri``, without contacting it yet.

        Args:
            uri: Holds only states of this training.
            folder: Holds one state, 12 bytes per parameter; removed at the end.
            every: How often a state is saved; None to decide by what it costs.
            belongs_to: The inputs of the training. A state with other inputs is not used.
        """
        self._uri, self._folder = uri, folder
        self.pace, self.belongs_to = Pace(every), dict(belongs_to)
        self._publisher = ThreadPoolExecutor(1, "training-state")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "SavedStates":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the state being published."""
        self._publisher.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def newest(self, model: "Module", *, first_step: int) -> "TrainingState | None":
        """Return the newest state that verifies and fits the model; its files stay until the next save.

        States that are damaged or belong to another training are removed: this one will need the name.

        Returns:
            None if there is no such state.

        Raises:
            StorageError: If the store cannot be read.
        """
        for step in reversed(published_steps(self._uri)):
            try:
                state = self.fetch(step, model, first_step)
            except (IntegrityError, CheckpointError) as error:
                problem = str(error).partition(". ")[0].rstrip(".")  # its advice is carried out here
                log.warning("the training state of step %d is removed, not used: %s", step, problem)
                remove_states(self._uri, steps=range(step, step + 1))
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                self.resume(state.progress)
                return state
        return None

    def fetch(self, step: int, model: "Module", first_step: int) -> "TrainingState":
        """Return the state of a step; see ``newest``.

        Raises:
            CheckpointError: If it is not a whole state of this training.
            IntegrityError: If a file is damaged.
        """
        from core.training.parallel.parts import merged
        from core.training.state import STATE, check_fits, read_state

        published, folder = open_publication(_place(self._uri, step)), self._folder / "fetched"
        state = read_state(published.fetch(folder, only=[STATE]))
        progress = state.progress
        steps = progress.losses[0][0], progress.next_step
        if state.belongs_to != self.belongs_to or steps != (first_step, step):
            raise CheckpointError(f"{published.uri} belongs to another training.")
        fetched = [published.fetch(folder)]
        for name in state.parts:
            part = find_publication(join_uri(published.uri, name))
            if part is None:
                raise CheckpointError(f"{published.uri} lacks the part {name} of a node.")
            fetched.append(part.fetch(folder / name))
        state = read_state(merged(fetched, self._folder / "merged"))
        check_fits(state, model)
        return state

    def save(self, model: "Module", optimizer: "Optimizer", progress: "TrainingProgress") -> None:
        """Save the state if one is due and the previous one is published; failures are logged.

        It is copied to host memory when this returns, if that has room, and written and published while
        training continues. Otherwise it is written first.
        """
        from core.training.state import drained, state_bytes, state_tensors, write_state

        folder, size = self._folder / "saved", state_bytes(model)
        if not self.start(progress, size):
            return
        progress = progress.snapshot()
        with self.pace.standstill():
            tensors = dict(state_tensors(model, optimizer))
            write = functools.partial(write_state, folder, progress=progress, belongs_to=self.belongs_to)
            complete: Callable[[], object] = _nothing_left
            if size < _MOST_OF_MEMORY * spare_bytes():
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                complete = functools.partial(write, drained(tensors))
            else:
                try:
                    write(tensors.items())
                except StorageError as error:
                    log.warning(_NOT_SAVED, progress.next_step, error)
                    shutil.rmtree(folder, ignore_errors=True)
                    return
        self.publish(progress, complete)

    def resume(self, progress: "TrainingProgress") -> None:
        """Count from here when the next state is due."""
        self.pace.resume(len(progress.losses))

    def start(self, progress: "TrainingProgress", size: int) -> bool:
        """Return whether a state is due and the previous one is published; then there is room for it.

        Args:
            progress: After each step.
            size: Bytes of the state.
        """
        under_way = self._under_way is not None and not self._under_way.done()
        if not self.pace.is_due(len(progress.losses), size=size, transferring=under_way):
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def publish(self, progress: "TrainingProgress", complete: Callable[[], object]) -> None:
        """Publish the state in ``saved`` while training continues, once ``complete`` has returned there."""
        self._under_way = self._publisher.submit(
            self._publish, self._folder / "saved", progress.next_step, time.monotonic(), complete
        )

    def _publish(self, folder: Path, step: int, started: float, complete: Callable[[], object]) -> None:
        try:
            complete()
            size = publish(folder, _place(self._uri, step)).manifest.total_bytes
        except Exception as error:  # no failure may end hours of training
            log.warning(_NOT_SAVED, step, error, exc_info=not isinstance(error, AdaptPrunerError))
            superseded = range(step, step + 1)  # a partial state only takes space
        else:
            seconds = time.monotonic() - started
            log.info(
                "saved the training state of step %d (%.1f MB, %.1f s; training stood still for %.2f s)",
                *(step, size / 1e6, seconds, self.pace.blocked_s or 0.0),
            )
            self.pace.stored(seconds)
            superseded = range(step)
        shutil.rmtree(folder, ignore_errors=True)
        remove_states(self._uri, steps=superseded)


def _nothing_left() -> None:
    """Complete a state that is written already."""


def remove_states(uri: str, *, steps: range | None = None) -> None:
    """Remove states, including partly published ones; failures are logged, as nothing depends on it.

    Args:
        uri: Where they are.
        steps: Which ones; None for all.
    """
    store = open_store(uri)
    try:
        keys = [key for key in store.list() if steps is None or _step_of(key) in steps]
        for key in sorted(keys, key=lambda key: not key.endswith(MANIFEST)):  # it promises the other files
            store.delete(key)
    except StorageError as error:
        log.warning("training states that are no longer needed could not be removed: %s", error)
    folder = store.local_path("")
    if steps is None and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted write leaves files that are not listed


def published_steps(uri: str) -> list[int]:
    """Return the steps of the states that are published, in their order."""
    steps = [_step_of(key) for key in open_store(uri).list() if key.partition("/")[2] == MANIFEST]
    return sorted(step for step in steps if step >= 0)


def _place(uri: str, step: int) -> str:
    return join_uri(uri, state_name(step))


def state_name(step: int) -> str:
    """Return the name of the state of a step among the others."""
    return f"{step:06d}"


def _step_of(key: str) -> int:
    """Return the step of the state that a key belongs to; -1 if none."""
    name = key.partition("/")[0]
    return int(name) if name.isdecimal() and name == state_name(int(name)) else -1
