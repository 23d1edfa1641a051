"""The last step of every execution, whether it succeeded or not: finalize."""

import logging

from core.errors import LeaseError, StorageError, TrackingError
from core.runs.run import Run
from core.steps.dropped import drop_checkpoints
from core.steps.frame import tracker_of
from core.storage.garbage import find_garbage, remove
from core.storage.layout import pointer_of
from core.storage.lease import read_lease
from core.storage.store import open_store
from core.untrusted import parse_object

log = logging.getLogger(__name__)


def run_finalize(*, store: str, job: str, succeeded: bool) -> None:
    """Close an execution: its status, its lease and, of a run that is done, what need not stay.

    Where MLflow fails, the pointer to the run stays: this is tried again. An execution that has found its run
    done has nothing to tell MLflow, and does not fail with it.

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
    lease = read_lease(open_store(store), run.folder)
    has_worked = lease is not None and lease.owner.job == job  # a run that is found done is not leased
    try:
        with run.working():
            done = run.is_complete()
            if done:
                drop_checkpoints(run)
                _clean(run)
            try:
                tracker_of(run).finish("FINISHED" if succeeded or done else "FAILED")
            except TrackingError as error:
                if has_worked or not done:
                    raise
                log.warning("the run was done before, so MLflow need not be told: %s", error)
    except LeaseError as error:
        log.info("left to another execution: %s", error)
    finally:
        run.release()
    open_store(store).delete(pointer_of(job))


def _clean(run: Run) -> None:
    """Remove what the run's executions have left in the store and no manifest claims."""
    store = open_store(run.store)
    found = find_garbage(store, run=run.key, job=run.job)
    files = [file for piece in found.garbage for file in piece.files]
    remove(store, files)
    if files:
        log.info("removed %d orphaned files", len(files))
