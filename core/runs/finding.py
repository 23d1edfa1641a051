"""Runs in stores, by their key, name, base model, a setting, or the place they have."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import SettingsError, StorageError, refuse
from core.runs.gathering import collect_record
from core.runs.overview import RunOverview, list_runs
from core.runs.record import RunRecord
from core.runs.run import Run
from core.storage.interface import Store
from core.storage.layout import RECORD
from core.storage.publication import open_publication
from core.storage.store import open_store
from core.storage.transfer import in_parallel

_PLACE = re.compile(r"(.+)/runs/([0-9a-f]{12})(?:/.*)?")  # a store's own path may hold a folder ``runs``
_KEY_PREFIX = 4  # characters; below, a name is more likely meant


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as its store has it."""

    store: str
    """URI of the store."""
    overview: RunOverview
    run: Run | None = field(repr=False)
    """None if it is damaged."""

    @property
    def state(self) -> str:
        """``done``, or how far it has come."""
        seen = self.overview
        return seen.state if seen.state == "done" else f"{seen.state}, phase {seen.phase} of {seen.phases}"

    def matches(self, wanted: str) -> bool:
        """Return whether ``wanted`` is its key (or the beginning), its name, its base model or a setting."""
        seen, name, sign, value = self.overview, *wanted.partition("=")
        if sign:
            return self.run is not None and value in _setting(self.run.settings.to_dict(), name)
        begins = len(wanted) >= _KEY_PREFIX and seen.key.startswith(wanted)
        return begins or wanted in self.names

    @property
    def place(self) -> str:
        """Where it is."""
        return f"{self.store}/runs/{self.overview.key}"

    @property
    def names(self) -> tuple[str, ...]:
        """What it can be asked for by."""
        seen = self.overview
        return seen.key, seen.name, seen.base, seen.base.rstrip("/").rpartition("/")[2]

    def record(self) -> RunRecord | None:
        """Return what it has measured: as it was published, or so far; None of a damaged run.

        Raises:
            StorageError: If the store cannot be read.
        """
        run = self.run
        if run is None:
            return None
        if self.overview.state == "done":
            # Measured otherwise since, or by an older version: what it was published with.
            uri = run.report_uri() if run.is_complete() else run.uri("final")
            return RunRecord.from_dict(open_publication(uri).read_json(RECORD))
        record = collect_record(run, "", range(self.overview.phase + 1))
        planned = [phase for phase in record.phases if phase.sparsity or not phase.phase]
        return replace(record, phases=tuple(planned))


def stored_runs(store: Store, key: str = "") -> list[StoredRun]:
    """Return all runs of a store, the last active one first; or the one of this key alone.

    Raises:
        StorageError: If the store cannot be read.
    """
    overviews = list_runs(store, key)
    runs = in_parallel(lambda overview: _loaded(store, overview.key), overviews)
    return [
        StoredRun(store=store.uri, overview=seen, run=run) for seen, run in zip(overviews, runs, strict=True)
    ]


class RunFinder:
    """Finds runs in stores, each of which is read once."""

    def __init__(self, stores: Sequence[str]) -> None:
        """Look in ``stores`` for what is asked for by another word than its place."""
        self.stores = stores
        self._known: dict[str, list[StoredRun]] = {}

    def select(self, wanted: Iterable[str]) -> list[StoredRun]:
        """Return the runs that are asked for, in that order, each once.

        Args:
            wanted: Of each run, or of several, the key, name or base model, a setting
                (``prune.method=flap``), or its place; of a store all runs. Nothing: all runs of ``stores``.

        Raises:
            SettingsError: If there is no such run, or no such folder.
            StorageError: If a store cannot be read.
        """
        matches = {text: self._found(text) for text in wanted}
        matches = matches or {uri: self._runs_of(uri) for uri in self.stores}
        refuse(f"{text}: no such run{self._hint(text)}" for text, runs in matches.items() if not runs)
        return list({id(run): run for runs in matches.values() for run in runs}.values())

    def one(self, wanted: str) -> StoredRun:
        """Return the run that is asked for.

        Raises:
            SettingsError: If there is none, or more than one.
        """
        found = self.select([wanted])
        if len(found) > 1:
            keys = ", ".join(run.overview.key for run in found[:5])
            raise SettingsError([f"{wanted} names {len(found)} runs: {keys}. Give the key of one."])
        return found[0]

    def _found(self, text: str) -> list[StoredRun]:
        store, key = place_of(text)
        if store:
            return [run for run in self._runs_of(store) if key in ("", run.overview.key)]
        return [run for uri in self.stores for run in self._runs_of(uri) if run.matches(text)]

    def _runs_of(self, uri: str) -> list[StoredRun]:
        store = open_store(uri)
        folder = store.local_path("")
        if folder is not None and not folder.is_dir():
            where = "in place of RUN or by --store"
            raise SettingsError([f"{uri} is not a folder. Give the runs' storage.store {where}."])
        if store.uri not in self._known:
            self._known[store.uri] = stored_runs(store)
        return self._known[store.uri]

    def _hint(self, text: str) -> str:
        runs = [run for found in self._known.values() for run in found]
        where = ", ".join(self._known)
        if not runs:
            return f": {where} holds none. Name another store."
        names = dict.fromkeys(name for run in runs for name in run.names if name)
        near = difflib.get_close_matches(text, names, n=4, cutoff=0.5)
        some = near or list(dict.fromkeys(run.overview.name for run in runs if run.overview.name))[:4]
        said = "Near" if near else "There are"
        return f" in {where}. {said}: {', '.join(some)}. `adapt-pruner runs` lists all."


def place_of(text: str) -> tuple[str, str]:
    """Return the store and, of a run in it, the key; "" for what is no place."""
    if place := _PLACE.fullmatch(text):
        return place[1], place[2]
    is_path = "://" in text or text.startswith(("/", "./", "../")) or Path(text, "runs").is_dir()
    return (text, "") if is_path else ("", "")


def _setting(settings: Any, name: str) -> Iterator[str]:
    """Yield the value of a setting as text, if there is one: as Python and as YAML writes it."""
    for part in name.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return
        settings = settings[part]
    yield str(settings)
    if not isinstance(settings, str):
        yield json.dumps(settings)


def _loaded(store: Store, key: str) -> Run | None:
    try:
        return Run.load({"store": store.uri, "key": key})
    except StorageError:
        return None  # damaged: ``adapt-pruner runs`` shows it
