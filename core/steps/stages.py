"""Stages of a measurement in the store: a task that was killed goes on after the last one.

Only where a measurement takes longer than some minutes. Each stage is a publication, named by its number.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import AdaptPrunerError, IntegrityError, PlanError, StorageError
from core.machine.memory import spare_bytes
from core.storage.interface import join_uri
from core.storage.layout import STATISTICS
from core.storage.publication import Publication, find_publication, publish
from core.storage.store import open_store
from core.training.pace import LEAST_S, Pace
from core.training.resume import published_steps, remove_states, state_name

if TYPE_CHECKING:
    from torch import Tensor

    from core.pruning.scoring.stages import Stage
    from core.pruning.scoring.statistics import Statistics

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the stages; those of another version are not used."""

_WORTH_S = 180.0
"""A measurement that takes less is done again."""
_MOST_OF_MEMORY, _MOST_OF_DISK = 0.25, 0.25
"""Share of what is free, for the states of a stage."""
_MUCH_MORE = 1.25
_FILE, _RESULT = "stage.safetensors", "result"


class SavedStages:
    """See ``core.pruning.scoring.stages.Stages``. The end of a ``with`` block waits for what is on its way.

    Attributes:
        earlier_s: Seconds that earlier attempts have given to what was found.
    """

    def __init__(
        self,
        uri: str,
        folder: Path,
        *,
        made_of: Mapping[str, Any],
        worth_s: float = _WORTH_S,
        pace: Pace | None = None,
    ) -> None:
        """Use a place in the store.

        Args:
            uri: Holds only stages of this measurement.
            folder: For files that are being written or read.
            made_of: Digests and settings. A stage of other ones is not used.
            worth_s: Seconds of a measurement from which on its stages are kept.
            pace: Tells when.
        """
        self._uri, self._folder, self._made_of = uri, folder, dict(made_of)
        self._worth_s, self._pace = worth_s, pace or Pace(None)
        self._parts: dict[int, Publication] = {}
        self._way: dict[str, int] = {}
        self._began, self.earlier_s = time.monotonic(), 0.0
        self.newest: Stage | None = None
        self._publisher = ThreadPoolExecutor(1, "stages")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "SavedStages":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is being stored."""
        self._publisher.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def agree(self, way: Mapping[str, int], most: Mapping[str, int]) -> Mapping[str, int]:
        """Look at what is kept. See ``Stages``.

        Raises:
            StorageError: If the store cannot be read.
        """
        self._way = dict(way)
        for number in reversed(published_steps(self._uri)):
            try:
                part = find_publication(join_uri(self._uri, state_name(number)))
                if part is None or not self._is_ours(part, most):
                    raise IntegrityError("it is of another measurement, or too large for this machine.")
                if self.newest is None:
                    self.newest = self._load(number, part)
                    self._way = part.manifest.metadata["way"]
                    self.earlier_s = part.manifest.metadata["seconds"]
                self._parts[number] = part
            except IntegrityError as error:
                self._remove(number, error)
        if self.newest is not None:
            self._pace.resume(0)
            log.info("goes on after %d of %d passes of layers", self.newest.number, self._passes(self.newest))
        return self._way

    def states(self, number: int) -> "Tensor | None":
        """See ``Stages``."""
        if self.newest is not None and number == self.newest.number:
            return self.newest.states
        part = self._parts.get(number)
        try:
            return None if part is None else self._load(number, part).states
        except IntegrityError as error:
            self._remove(number, error)
            return None

    def turn(self) -> None:
        """See ``Stages``."""
        self._pace.restart_steps()

    def is_due(self, share: float, size: int) -> bool:
        """See ``Stages``."""
        under_way = self._under_way is not None and not self._under_way.done()
        if not self._parts and (time.monotonic() - self._began) / share < self._worth_s:
            return False
        if not self._pace.is_due(0, size=size, transferring=under_way):
            return False
        places = [open_store(self._uri).local_path(""), self._folder]
        disk = min(shutil.disk_usage(_existing(place)).free for place in places if place is not None)
        return size < _MOST_OF_MEMORY * spare_bytes() and size < _MOST_OF_DISK * disk

    def keep(self, make: "Callable[[], Stage]", superseded: range) -> None:
        """See ``Stages``; failures are logged."""
        with self._pace.standstill():
            stage = make()
        seconds = self.earlier_s + time.monotonic() - self._began
        self._under_way = self._publisher.submit(self._publish, stage, superseded, seconds)

    def result(self) -> "Statistics | None":
        """Return the whole measurement, if an earlier attempt has finished it."""
        from core.pruning.scoring.statistics import Statistics

        uri, folder = join_uri(self._uri, _RESULT), self._folder / _RESULT
        try:
            found = find_publication(uri)
            if found is None:
                return None
            if found.manifest.metadata.get("made_of") != self._made_of:
                found.delete()
                return None
            return Statistics.load(found.fetch(folder, only=[STATISTICS]) / STATISTICS)
        except (IntegrityError, PlanError) as error:
            problem = str(error).partition(". ")[0].rstrip(".")  # its advice is carried out here
            log.warning("a measurement that was kept is removed, and done again: %s", problem)
            remove_states(uri)  # whatever is there: no other can be published at this place
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def finish(self, statistics: "Statistics") -> None:
        """Keep the whole measurement if it took a while; failures are logged."""
        seconds = time.monotonic() - self._began
        if seconds < min(LEAST_S, self._worth_s):
            return
        folder = self._folder / _RESULT
        try:
            folder.mkdir(parents=True)
            statistics.save(folder / STATISTICS)
            publish(folder, join_uri(self._uri, _RESULT), metadata={"made_of": self._made_of})
        except StorageError as error:
            log.warning("what has been measured is not kept: %s", error)

    def _publish(self, stage: "Stage", superseded: range, seconds: float) -> None:
        from safetensors.torch import save_file

        folder, started = self._folder / "kept", time.monotonic()
        try:
            folder.mkdir(parents=True)
            tensors = {"states": stage.states, "similarities": stage.similarities}
            for index, scores in stage.scores.items():
                tensors |= {f"{index}.{kind}": tensor.contiguous() for kind, tensor in vars(scores).items()}
            save_file(tensors, folder / _FILE)
            metadata = {"format": FORMAT, "made_of": self._made_of, "way": self._way, "seconds": seconds}
            publish(
                folder,
                join_uri(self._uri, state_name(stage.number)),
                metadata=metadata | {"loss": stage.loss, "scored": sorted(stage.scores)},
            )
            log.info(
                "kept what %d of %d passes of layers have measured (%.1f MB)",
                *(stage.number, self._passes(stage), stage.states.nbytes / 1e6),
            )
            self._pace.stored(time.monotonic() - started)
        except Exception as error:  # no failure may end a measurement
            log.warning(
                "what has been measured is not kept, and the measurement goes on: %s",
                error,
                exc_info=not isinstance(error, AdaptPrunerError),
            )
        else:
            if superseded:
                remove_states(self._uri, steps=superseded)
        shutil.rmtree(folder, ignore_errors=True)

    def _is_ours(self, part: Publication, most: Mapping[str, int]) -> bool:
        told = part.manifest.metadata
        if told.get("format") != FORMAT or told.get("made_of") != self._made_of:
            return False
        if self.newest is not None:
            return bool(told["way"] == self._way)
        return all(told["way"][name] <= _MUCH_MORE * fits for name, fits in most.items())

    def _load(self, number: int, part: Publication) -> "Stage":
        from safetensors.torch import load_file

        from core.pruning.scoring.stages import Stage
        from core.pruning.scoring.statistics import LayerScores

        found = load_file(part.fetch(self._folder / f"fetched-{number}") / _FILE)
        scores = {
            index: LayerScores(**{kind.name: found[f"{index}.{kind.name}"] for kind in fields(LayerScores)})
            for index in part.manifest.metadata["scored"]
        }
        return Stage(
            number=number,
            states=found["states"],
            similarities=found["similarities"],
            scores=scores,
            loss=part.manifest.metadata["loss"],
        )

    def _remove(self, number: int, error: IntegrityError) -> None:
        problem = str(error).partition(". ")[0].rstrip(".")  # its advice is carried out here
        log.warning("what was kept after %d passes of layers is removed, not used: %s", number, problem)
        remove_states(self._uri, steps=range(number, number + 1))

    @staticmethod
    def _passes(stage: "Stage") -> int:
        return 2 * len(stage.similarities)


def _existing(place: Path) -> Path:
    """Return the folder that a place is in, or will be."""
    return next(each for each in (place, *place.absolute().parents) if each.is_dir())
