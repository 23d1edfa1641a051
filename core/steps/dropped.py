"""Checkpoints of phases that a run which is done does not keep, until it is to be done again."""

import logging

from core.runs.run import Run
from core.storage.layout import REPORT
from core.storage.publication import MANIFEST, delete_publication, read_manifest, read_published
from core.storage.store import open_store

log = logging.getLogger(__name__)


def drop_checkpoints(run: Run) -> None:
    """Remove the files of the checkpoints that ``storage.keep`` does not ask for; their manifests stay."""
    for phase in _phases_to_drop(run):
        for step in ("pruned", "recovered"):
            # What the step has told stays: a run that is measured again shows it.
            delete_publication(run.phase_uri(phase, step), keep_manifest=True, keep=[REPORT])


def withdraw_dropped(run: Run) -> None:
    """Let the steps compute the checkpoints again that were dropped, as those of a run that was done are.

    A person has then removed something of the run that was damaged. What makes it again may need each of
    them: their weights, or the figures beside these. The run's lease must be held. A run that
    is done and is measured again needs none of them: what it has not kept is not measured.
    """
    if Run.is_done(run.handle()):
        return
    keys = set(open_store(run.store).list(f"{run.folder}/"))
    for phase in range(1, len(run.phase_params) + 1):
        for step in ("pruned", "recovered"):
            uri, folder = run.phase_uri(phase, step), f"{run.folder}/phases/{phase:02d}/{step}"
            if f"{folder}/{MANIFEST}" in keys and not _has_files(uri, folder, keys):
                log.info("phase %d: the %s checkpoint was dropped, and is needed again", phase, step)
                delete_publication(uri, keep_manifest=False)


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
        perplexities = {p: read_published(run.measured_uri(p), REPORT).get("perplexity") for p in phases}
        measured = {p: value for p, value in perplexities.items() if value is not None}
        best = min(measured, key=lambda p: measured[p]) if measured else phases[-1]
        return [phase for phase in phases if phase != best]
    return [phase for phase in phases if phase % int(keep)]
