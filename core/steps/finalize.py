"""The last step of every execution, whether it succeeded or not: finalize."""

import logging

from core.errors import LeaseError, StorageError
from core.run import Run
from core.steps.once import REPORT, read_published, tracker_of
from core.storage.garbage import find_garbage, remove
from core.storage.layout import pointer_of
from core.storage.manifest import delete_publication
from core.storage.store import open_store
from core.untrusted import parse_object

log = logging.getLogger(__name__)


def run_finalize(*, store: str, job: str, succeeded: bool) -> None:
    """Close an execution: its status, its lease and, of a run that is done, what need not stay.

    Args:
        store: URI of the store.
        job: The execution that resolve-base has noted the run of.
        succeeded: How it ended.
    """
    try:
        pointer = parse_object(open_store(store).read_bytes(pointer_of(job)))
        handle = {"store": store, "key": str(pointer["key"]), "job": job}
    except FileNotFoundError:
        log.info("no run was opened")
        return
    except (ValueError, KeyError) as error:
        raise StorageError(f"{store}/{pointer_of(job)} is damaged: {error}. Remove it.") from error
    run = Run.load(handle)
    try:
        with run.working():
            done = run.is_complete()
            tracker_of(run).finish("FINISHED" if succeeded or done else "FAILED")
            if done:
                _drop_checkpoints(run)
                _clean(run)
        run.release()
    except LeaseError as error:
        log.info("left to another execution: %s", error)
    open_store(store).delete(pointer_of(job))


def _drop_checkpoints(run: Run) -> None:
    for phase in _phases_to_drop(run):
        for step in ("pruned", "recovered"):
            # What the step has told stays: a run that is measured again shows it.
            delete_publication(run.phase_uri(phase, step), keep_manifest=True, keep=[REPORT])


def _clean(run: Run) -> None:
    """Remove what the run's executions have left in the store and no manifest claims."""
    store = open_store(run.store)
    found = find_garbage(store, run=run.key, job=run.job)
    files = [file for piece in found.garbage for file in piece.files]
    remove(store, files)
    if files:
        log.info("removed %d files that belong to nothing any more", len(files))


def _phases_to_drop(run: Run) -> list[int]:
    """Return the phases whose checkpoints ``storage.keep`` does not ask for; the final one is kept apart."""
    keep, phases = run.settings.storage.keep, range(1, len(run.phase_params) + 1)
    if keep == "all":
        return []
    if keep == "last":
        return list(phases)
    if keep == "best":
        perplexities = {
            p: read_published(run.measured_uri(p), "report.json").get("perplexity") for p in phases
        }
        measured = {p: value for p, value in perplexities.items() if value is not None}
        best = min(measured, key=lambda p: measured[p]) if measured else phases[-1]
        return [phase for phase in phases if phase != best]
    return [phase for phase in phases if phase % int(keep)]
