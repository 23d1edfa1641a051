"""Training states in the store: published while training continues, found by the next attempt.

Each is a publication named by its step, so it is either there whole and verified or not at all. The last one
stays until a newer one is published.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import AdaptPrunerError, CheckpointError, IntegrityError, StorageError
from core.quantities import Interval
from core.storage.interface import join_uri
from core.storage.publication import MANIFEST, open_publication, publish
from core.storage.store import open_store

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from core.training.state import TrainingProgress, TrainingState

log = logging.getLogger(__name__)

_NOT_SAVED = (
    "the training state of step %d is not saved: %s Training continues; the next one is tried as usual."
)


class SavedStates:
    """The states of one training: their place in the store, and a thread that publishes them.

    The end of a ``with`` block waits for the state being published.
    """

    def __init__(self, uri: str, folder: Path, *, every: Interval, belongs_to: Mapping[str, str]) -> None:
        """Use the place ``uri``, without contacting it yet.

        Args:
            uri: Holds only states of this training.
            folder: Holds one state, 12 bytes per parameter; removed at the end.
            every: How often a state is saved.
            belongs_to: The inputs of the training. A state with other inputs is not used.
        """
        self._uri, self._folder = uri, folder
        self._every, self.belongs_to = every, dict(belongs_to)
        self._last = (0, time.monotonic())
        self._publisher = ThreadPoolExecutor(1, "training-state")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "SavedStates":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the state being published."""
        self._publisher.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def newest(self, model: "PreTrainedModel", *, first_step: int) -> "TrainingState | None":
        """Return the newest state that verifies and fits the model; its files stay until the next save.

        States that are damaged or belong to another training are removed: this one will need the name.

        Returns:
            None if there is no such state.

        Raises:
            StorageError: If the store cannot be read.
        """
        for step in reversed(_published(self._uri)):
            try:
                state = self._fetch(step, model, first_step)
            except (IntegrityError, CheckpointError) as error:
                problem = str(error).partition(". ")[0].rstrip(".")  # its advice is carried out here
                log.warning("the training state of step %d is removed, not used: %s", step, problem)
                remove_states(self._uri, steps=range(step, step + 1))
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                self.resume(state.progress)
                return state
        return None

    def _fetch(self, step: int, model: "PreTrainedModel", first_step: int) -> "TrainingState":
        from core.training.parallel.parts import merged
        from core.training.state import STATE, check_fits, read_state

        published, folder = open_publication(_place(self._uri, step)), self._folder / "fetched"
        state = read_state(published.fetch(folder, only=[STATE]))
        progress = state.progress
        steps = progress.losses[0][0], progress.next_step
        if state.belongs_to != self.belongs_to or steps != (first_step, step):
            raise CheckpointError(f"{published.uri} belongs to another training.")
        state = read_state(merged(published.fetch(folder), self._folder / "merged"))
        check_fits(state, model)
        return state

    def save(self, model: "PreTrainedModel", optimizer: "Optimizer", progress: "TrainingProgress") -> None:
        """Save the state if one is due and the previous one is published; failures are logged.

        It is on the local disk when this returns, and is published while training continues.
        """
        from core.training.state import write_state

        folder = self._folder / "saved"
        if not self.start(progress):
            return
        try:
            write_state(folder, model, optimizer, progress, belongs_to=self.belongs_to)
        except StorageError as error:
            log.warning(_NOT_SAVED, progress.next_step, error)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self.publish(progress)

    def resume(self, progress: "TrainingProgress") -> None:
        """Count from here when the next state is due."""
        self._last = (len(progress.losses), time.monotonic())

    def start(self, progress: "TrainingProgress") -> bool:
        """Return whether a state is due and the previous one is published; then there is room for it."""
        now, done = time.monotonic(), len(progress.losses)
        if not self._every.is_over(done - self._last[0], now - self._last[1]):
            return False
        if self._under_way is not None and not self._under_way.done():
            return False
        self._last = (done, now)
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def publish(self, progress: "TrainingProgress", complete: Callable[[], None] = lambda: None) -> None:
        """Publish the state in ``saved`` while training continues, once ``complete`` has returned there."""
        self._under_way = self._publisher.submit(
            self._publish, self._folder / "saved", progress.next_step, time.monotonic(), complete
        )

    def _publish(self, folder: Path, step: int, started: float, complete: Callable[[], None]) -> None:
        try:
            complete()
            size = publish(folder, _place(self._uri, step)).manifest.total_bytes
        except Exception as error:  # no failure may end hours of training
            log.warning(_NOT_SAVED, step, error, exc_info=not isinstance(error, AdaptPrunerError))
            superseded = range(step, step + 1)  # a partial state only takes space
        else:
            seconds = time.monotonic() - started
            log.info("saved the training state of step %d (%.1f MB, %.1f s)", step, size / 1e6, seconds)
            superseded = range(step)
        shutil.rmtree(folder, ignore_errors=True)
        remove_states(self._uri, steps=superseded)


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


def _published(uri: str) -> list[int]:
    steps = [_step_of(key) for key in open_store(uri).list() if key.partition("/")[2] == MANIFEST]
    return sorted(step for step in steps if step >= 0)


def _place(uri: str, step: int) -> str:
    return join_uri(uri, _name(step))


def _name(step: int) -> str:
    return f"{step:06d}"


def _step_of(key: str) -> int:
    """Return the step of the state that a key belongs to; -1 if none."""
    name = key.partition("/")[0]
    return int(name) if name.isdecimal() and name == _name(int(name)) else -1
