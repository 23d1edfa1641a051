"""Orphaned files in a store.

Publications claim the files that their manifests list. Whatever else lies in their folders was left by a
publisher that was killed, or that was second. Nothing is removed where somebody may be writing: a run is
cleaned under its lease; what has no lease, such as a base model that is taken up, is left alone for a day.
Files outside of the layout of a store are not ours, and stay.
"""

import dataclasses
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from core.errors import IntegrityError, LeaseError, StorageError
from core.storage.interface import Store, StoredFile, is_temporary, join_uri
from core.storage.layout import GENERATED, HTML, RESUME, TEACHER, folder_of, pointer_of, publication_of
from core.storage.lease import TTL_S, Lease, holding_lease, lease_number, read_lease, release_lease
from core.storage.owner import Owner
from core.storage.publication import MANIFEST, find_publication

PATIENCE_S = 86_400.0
"""How long files are left alone that an unknown process may be writing."""

_OWN = ("run.json", "DONE.json", HTML)
_RESUMED = {
    "data": "prepared data",
    TEACHER: "a training state of the teacher",
    "recovered": "a training state of a phase",
    "pruned": "a training state of a phase",
    GENERATED: "the base model's own text so far",
}
"""Last part of the place of a publication to what is kept there until it is published."""

_INTERRUPTED = "an interrupted write"
_THREADS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Files that go together."""

    place: str
    """Folder in the store that they lie in."""
    reason: str
    """Why nothing needs them."""
    files: tuple[StoredFile, ...]
    run: str = ""
    """Folder of the run that they belong to, whose lease must be held while they are removed."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The findings of a look at a store."""

    garbage: list[Garbage] = field(default_factory=list)
    """What may go."""
    spared: dict[str, str] = field(default_factory=dict)
    """Folder of each run or publication that is left alone: why."""
    foreign: list[str] = field(default_factory=list)
    """Keys outside of the layout: somebody else's."""


def find_garbage(
    store: Store, *, run: str = "", job: str | None = None, patience_s: float = PATIENCE_S
) -> Findings:
    """Find what may be removed.

    Args:
        store: The store.
        run: Look at the run of this key only, and at what points to it.
        job: The execution that asks: its own lease and pointer are not of interest.
        patience_s: Minimum age of files that are written without a lease.

    Raises:
        StorageError: If the store cannot be reached or read.
    """
    search = _Search(store=store, run=run and f"runs/{run}", job=job, patience_s=patience_s)
    return search.below(f"runs/{run}/", "jobs/") if run else search.below("")


def clean(
    store: Store, garbage: Iterable[Garbage], owner: Owner, *, patience_s: float = PATIENCE_S
) -> list[StoredFile]:
    """Remove what ``find_garbage`` has found, as far as it is garbage still.

    Each run is looked at again while ``owner`` holds its lease: one that was started meanwhile is spared.

    Args:
        store: The store.
        garbage: What to remove.
        owner: Holds the leases.
        patience_s: What ``find_garbage`` was given.

    Returns:
        What was removed.

    Raises:
        StorageError: If the store cannot be reached or written.
    """
    wanted = defaultdict[str, set[StoredFile]](set)
    for piece in garbage:
        wanted[piece.run].update(piece.files)
    removed = []
    for run in sorted(filter(None, wanted)):
        try:
            with holding_lease(store, run, owner):
                key = run.removeprefix("runs/")
                found = find_garbage(store, run=key, job=owner.job, patience_s=patience_s)
                removed += _remove_if(store, found.garbage, wanted[run])
            removed += [file for file in wanted[run] if _is_lease(run, file.key)]  # went when it was taken
        except LeaseError as error:
            log.warning("spared: %s", error)
        finally:
            release_lease(store, run, owner.job)
    rest = _Search(store=store, patience_s=patience_s).below(
        "answers/", "bases/", "jobs/", "precisions/", "revisions/"
    )
    return removed + _remove_if(store, [piece for piece in rest.garbage if not piece.run], wanted[""])


def remove(store: Store, files: Iterable[StoredFile]) -> None:
    """Remove files and what interrupted writes have left; missing ones are not an error."""

    def remove_one(file: StoredFile) -> None:
        if _is_unfinished(file):
            store.discard(file)
        else:
            store.delete(file.key)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(remove_one, files))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A look at a store, and its findings so far."""

    store: Store
    patience_s: float
    run: str = ""
    """Folder of the only run to look at; "" for all."""
    job: str | None = None
    found: Findings = field(default_factory=Findings)

    def below(self, *prefixes: str) -> Findings:
        places = defaultdict[str, list[StoredFile]](list)
        for prefix in prefixes:
            for file in (*self.store.stored(prefix), *_unfinished(self.store, prefix)):
                places[folder_of(file.key)].append(file)
        pointers = places.pop("jobs", [])
        for notes in ("answers", "precisions", "revisions"):
            self._look_at_notes(notes, places.pop(notes, []))
        self.found.foreign.extend(file.key for file in places.pop("", []))
        for place, files in sorted(places.items()):
            if place.startswith("runs/"):
                self._look_at_run(place, files)
            else:
                self._look_at_publication(place, files, patience_s=self.patience_s)
        self._look_at_pointers(pointers)
        return self.found

    def _look_at_run(self, run: str, files: list[StoredFile]) -> None:
        keys = {file.key for file in files if not _is_unfinished(file)}
        done, lease = f"{run}/DONE.json" in keys, read_lease(self.store, run)
        is_others = lease is not None and lease.owner.job != self.job
        if lease is not None and is_others and (reason := _why_spared(lease, done=done)):
            self.found.spared[run] = reason
            return
        steps, rest = defaultdict[str, list[StoredFile]](list), []
        for file in files:
            inner = file.key.removeprefix(f"{run}/")
            if publication := publication_of(file.key):
                steps[publication].append(file)
            elif _is_unfinished(file):
                if _is_old(file, min(self.patience_s, TTL_S)):
                    rest.append((_INTERRUPTED, file))
            elif _is_lease(run, file.key):
                if is_others:
                    rest.append(("a lease that nobody holds", file))
            elif inner not in _OWN:
                self.found.foreign.append(file.key)
        if steps and f"{run}/run.json" not in keys:
            self.found.spared[run] = "it has no run.json"
            return
        self._add(run, rest)
        for place, group in sorted(steps.items()):
            self._look_at_publication(place, group, done=done)

    def _look_at_publication(
        self, place: str, files: list[StoredFile], *, done: bool = False, patience_s: float = 0.0
    ) -> None:
        try:
            published = find_publication(join_uri(self.store.uri, place))
        except IntegrityError:
            self.found.spared[place] = "its manifest is damaged"
            return
        manifest = published.manifest if published else None
        claimed = {f"{place}/{manifest.key(entry)}" for entry in manifest.files} if manifest else set()
        loose = []
        for file in files:
            if _is_unfinished(file):
                loose.append((_INTERRUPTED, file))
            elif file.key.startswith(f"{place}/{RESUME}/"):
                if manifest or done:
                    step = place.rpartition("/")[2]
                    what = _RESUMED.get(step, "measurements or a training state of a phase")
                    loose.append((f"{what} that is published", file))
            elif manifest is None:
                loose.append(("half published: there is no manifest", file))
            elif file.key not in claimed and file.key != f"{place}/{MANIFEST}":
                loose.append(("not listed by the manifest beside it", file))
        if all(_is_old(file, patience_s) for _, file in loose):
            self._add(place, loose)
        else:
            self.found.spared[place] = "it was written to less than a day ago"

    def _look_at_notes(self, place: str, files: list[StoredFile]) -> None:
        """Spare what recipes have begun with: their runs would change."""
        loose = [(_INTERRUPTED, file) for file in files if _is_unfinished(file)]
        self._add(place, [pair for pair in loose if _is_old(pair[1], self.patience_s)])

    def _look_at_pointers(self, files: list[StoredFile]) -> None:
        """Find what points to runs that are done or that nobody works on."""
        for file in files:
            is_old = _is_old(file, self.patience_s)
            if _is_unfinished(file):
                if is_old:
                    self._add("jobs", [(_INTERRUPTED, file)])
                continue
            try:
                run = f"runs/{json.loads(self.store.read_bytes(file.key))['key']}"
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError, RecursionError):
                self.found.foreign.append(file.key)
                continue
            if folder_of(f"{run}/run.json") != run:
                self.found.foreign.append(file.key)
                continue
            is_own = self.job is not None and file.key == pointer_of(self.job)
            if is_own or run in self.found.spared or self.run not in ("", run):
                continue
            if self.store.exists(f"{run}/run.json"):
                self._add("jobs", [("points to a run that is done or that nobody works on", file)], run)
            elif is_old:
                self._add("jobs", [("points to a run that is not there", file)])

    def _add(self, place: str, files: list[tuple[str, StoredFile]], run: str = "") -> None:
        by_reason = defaultdict[str, list[StoredFile]](list)
        for reason, file in files:
            by_reason[reason].append(file)
        if place.startswith("runs/"):
            run = folder_of(f"{place}/.file")
        for reason, group in by_reason.items():
            self.found.garbage.append(Garbage(place=place, reason=reason, files=tuple(group), run=run))


def _is_old(file: StoredFile, patience_s: float) -> bool:
    return time.time() - file.modified_s >= patience_s


def _why_spared(lease: Lease, *, done: bool) -> str:
    if lease.is_live():
        return f"{lease.owner} works on it"
    if lease.is_leaving() and dataclasses.replace(lease, ttl_s=TTL_S).is_live():
        return f"{lease.owner} was told to end less than ten minutes ago"  # another of its pods may be alive
    is_recent = time.time() - lease.expires_s < PATIENCE_S and not lease.owner.is_gone()
    return f"{lease.owner} has yet to close it" if done and is_recent else ""


def _remove_if(store: Store, found: Iterable[Garbage], wanted: set[StoredFile]) -> list[StoredFile]:
    files = [file for piece in found for file in piece.files if file in wanted]
    remove(store, files)
    return files


def _unfinished(store: Store, prefix: str) -> Iterator[StoredFile]:
    try:
        yield from store.unfinished(prefix)
    except StorageError as error:  # listing them takes a permission of its own, and not every server can
        log.warning("incomplete uploads are not looked for: %s", error)


def _is_unfinished(file: StoredFile) -> bool:
    return bool(file.upload) or is_temporary(file.key.rpartition("/")[2])


def _is_lease(run: str, key: str) -> bool:
    folder, _, name = key.rpartition("/")
    return folder == f"{run}/_lease" and lease_number(name) is not None
