"""Checkpoints of phases that a run which is done keeps no longer, and what needs them again."""

import logging

from core.run import Run
from core.steps.once import read_published
from core.storage.layout import STEPS
from core.storage.manifest import MANIFEST, delete_publication, read_manifest
from core.storage.store import open_store

log = logging.getLogger(__name__)


def drop_checkpoints(run: Run) -> None:
    """Remove the files of the checkpoints that ``storage.keep`` does not ask for; their manifests stay."""
    for phase in _phases_to_drop(run):
        for step in ("pruned", "recovered"):
            delete_publication(run.phase_uri(phase, step), keep_manifest=True)


def withdraw_dropped(run: Run) -> None:
    """Let the steps compute checkpoints again that were dropped and that something missing is made of.

    Of a run that was done a person may have removed what was damaged. The run's lease must be held.
    """
    keys = set(open_store(run.store).list(f"{run.folder}/"))
    checkpoints = ("recovered", "pruned") if run.settings.training.total_steps else ("pruned",)
    needed = f"{run.folder}/final/{MANIFEST}" not in keys
    for phase in reversed(range(1, len(run.phase_params) + 1)):
        folder = f"{run.folder}/phases/{phase:02d}"
        missing = {step for step in STEPS if f"{folder}/{step}/{MANIFEST}" not in keys}
        needed |= "evaluated" in missing
        for step in checkpoints:
            if step not in missing and needed:
                needed = not _has_files(run.phase_uri(phase, step), f"{folder}/{step}", keys)
                if needed:
                    log.info("phase %d: the %s checkpoint was dropped, and is needed again", phase, step)
                    delete_publication(run.phase_uri(phase, step), keep_manifest=False)
            needed |= step in missing  # it will be computed, from what comes before it
        needed |= bool(missing & {"calibrated", "scored"})


def _has_files(uri: str, folder: str, keys: set[str]) -> bool:
    manifest = read_manifest(uri)
    return manifest is not None and all(f"{folder}/{manifest.key(entry)}" in keys for entry in manifest.files)


def _phases_to_drop(run: Run) -> list[int]:
    """Return the phases whose checkpoints ``storage.keep`` does not ask for; the final one is kept apart."""
    keep, phases = run.settings.storage.keep, range(1, len(run.phase_params) + 1)
    if keep == "all":
        return []
    if keep == "last":
        return list(phases)
    if keep == "best":
        perplexities = {
            p: read_published(run.phase_uri(p, "evaluated"), "report.json").get("perplexity") for p in phases
        }
        measured = {p: value for p, value in perplexities.items() if value is not None}
        best = min(measured, key=lambda p: measured[p]) if measured else phases[-1]
        return [phase for phase in phases if phase != best]
    return [phase for phase in phases if phase % int(keep)]
