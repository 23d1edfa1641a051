"""Runs that MLflow takes for running although nobody works on them: their lease in the store tells."""

import logging
import time
from collections.abc import Iterator

from core.errors import AdaptPrunerError, TrackingError
from core.runs.run import Run
from core.storage.garbage import PATIENCE_S
from core.storage.interface import Store
from core.storage.layout import folder_of
from core.storage.lease import Lease, read_lease, time_text
from core.tracking.client import sqlite_file
from core.tracking.mlflow import Tracker, open_tracker

log = logging.getLogger(__name__)


def close_dead_runs_of(store: Store) -> Iterator[str]:
    """End such runs in every MLflow experiment that runs of a store are tracked in, as far as it answers.

    Yields:
        What ``close_dead_runs`` does.
    """
    folders = {folder_of(key) for key in store.list("runs/") if key.endswith("/run.json")}
    trackers: dict[tuple[str, str], Tracker] = {}
    for folder in sorted(filter(None, folders)):
        try:
            settings = Run.load({"store": store.uri, "key": folder.removeprefix("runs/")}).settings
        except AdaptPrunerError:
            continue  # damaged, or of a later version
        tracker = open_tracker(settings.tracking, key="", name="")
        trackers[tracker.uri, settings.tracking.experiment] = tracker
    for tracker in trackers.values():
        database = sqlite_file(tracker.uri)
        if database is not None and not database.exists():
            continue  # on another machine, or moved
        try:
            yield from close_dead_runs(tracker, store)
        except TrackingError as error:
            log.warning("no runs were closed in MLflow: %s", error)


def close_dead_runs(tracker: Tracker, store: Store, *, sparing: str = "") -> Iterator[str]:
    """End the MLflow runs whose run in a store has died, as KILLED, or FINISHED if it was done by then.

    The lease tells. A local run has died when its process has ended or, on another machine, when its lease
    has expired. A pipeline's run may wait for a machine without a lease: it is given a day. One that was
    closed too early is opened again by its next step. Runs of other stores are left alone.

    Args:
        tracker: Of any run in the experiment.
        store: The store.
        sparing: Key of a run that is not looked at.

    Yields:
        Name and run key of each, and what is known of its end.
    """
    if not tracker.uri:
        return
    for run in tracker.running():
        folder = f"runs/{run.run_key}"
        if run.run_key == sparing or run.store not in ("", store.uri):
            continue
        if not store.exists(f"{folder}/run.json"):  # a store of the same name on another machine
            continue
        lease = read_lease(store, folder)
        if lease is not None and not _is_dead(lease):
            continue
        heard = f"{lease.owner}, last heard of at {time_text(lease.renewed_s)}" if lease else "nobody"
        end_s = lease.renewed_s if lease else 0.0
        try:
            was_done = Run.was_measured(store, run.run_key, run.measured)
        except AdaptPrunerError:
            continue  # of a later version
        if was_done:
            why = f"Closed after its end: {heard} was to do it."
            tracker.close(run, "FINISHED", why, end_s=end_s)
        else:
            why = f"**Killed**: its lease in the store is held by {heard}. The same recipe resumes it."
            tracker.close(run, "KILLED", why, end_s=end_s)
        yield f"{run.name}, run {run.run_key}: {why}"


def _is_dead(lease: Lease) -> bool:
    if lease.is_live():
        return False
    is_local = lease.owner.pid is not None
    return is_local or time.time() - lease.expires_s > PATIENCE_S
