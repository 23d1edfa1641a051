"""Which runs a store holds, how far each has come and who works on it."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from core.storage.interface import Store, StoredFile
from core.storage.layout import STEPS, folder_of, publication_of
from core.storage.lease import read_lease
from core.storage.publication import MANIFEST
from core.storage.transfer import in_parallel

State = Literal["done", "running", "interrupted", "damaged"]


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """What the files of a run say of it."""

    key: str
    state: State
    """``interrupted``: neither done nor held by a live lease; ``damaged``: without a sound run.json."""
    owner: str = ""
    """Who works on it; "" if nobody does."""
    name: str = ""
    base: str = ""
    """The base model."""
    target: str = ""
    """The size that was asked for."""
    phase: int
    """Last phase that has published anything, 0 before the first."""
    phases: int = 0
    """N_P; 0 if it is not known."""
    last_step: str
    """The furthest step that is published; "" if none is."""
    size: int
    """Bytes of all its files, without the base model."""
    active_s: float
    """When a file was written last, in seconds since 1970 (UTC)."""


def list_runs(store: Store, key: str = "") -> list[RunOverview]:
    """Return all runs of a store, the last active one first; or the one of this key alone.

    Nothing in the store is trusted: other files are left out, and a run without a sound ``run.json`` is
    described by what else there is of it.

    Raises:
        StorageError: If the store cannot be reached or read.
    """
    runs = defaultdict[str, list[StoredFile]](list)
    for file in store.stored(f"runs/{key}/" if key else "runs/"):
        if folder := folder_of(file.key):
            runs[folder].append(file)
    ours = [
        run
        for run, files in runs.items()
        if any(file.key == f"{run}/run.json" or publication_of(file.key) for file in files)
    ]
    found = in_parallel(lambda run: _overview(store, run, runs[run]), ours)
    return sorted(found, key=lambda run: (-run.active_s, run.key))


def _overview(store: Store, run: str, files: list[StoredFile]) -> RunOverview:
    keys, told = {file.key for file in files}, _told(store, run)
    phase, last_step = _reached(run, keys, told.get("phases", 0))
    lease = read_lease(store, run)
    owner = str(lease.owner) if lease is not None and lease.is_live() else ""
    done = {f"{run}/DONE.json", f"{run}/final/{MANIFEST}"} <= keys
    state: State = "done" if done else "running" if owner else "interrupted"
    return RunOverview(
        key=run.removeprefix("runs/"),
        state=state if told else "damaged",
        owner=owner,
        phase=phase,
        last_step=last_step,
        size=sum(file.size for file in files),
        active_s=max(file.modified_s for file in files),
        **told,
    )


def _told(store: Store, run: str) -> dict[str, Any]:
    """Return what ``run.json`` says; {} if there is none, or it is damaged."""
    try:
        data = json.loads(store.read_bytes(f"{run}/run.json"))
        settings = data["settings"]
        return {
            "name": str(settings["name"]),
            "base": str(settings["model"]["base"]),
            "target": str(settings["prune"]["target"]),
            "phases": len(data["phase_params"]),
        }
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _reached(run: str, keys: set[str], phases: int) -> tuple[int, str]:
    """Return the phase and the name of the furthest step that is published."""
    if f"{run}/final/{MANIFEST}" in keys:
        return phases, "publish"
    reached = [(0, "prepare-data")] if f"{run}/data/{MANIFEST}" in keys else [(0, "")]
    pattern = re.compile(rf"{re.escape(run)}/phases/([0-9]+)/([a-z]+)(?:-[0-9a-f]{{8}})?/{MANIFEST}")
    matches = filter(None, map(pattern.fullmatch, keys))
    published = {(int(match[1]), match[2]) for match in matches}
    reached += [
        (phase, step)
        for phase in sorted({phase for phase, _ in published})
        for folder, step in STEPS.items()
        if (phase, folder) in published
    ]
    return reached[-1]
