"""Whose turn it is: an execution opens a run, finds it done, or finds that another one works on it."""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from core.errors import LeaseError
from core.runs.run import Run
from core.steps.dropped import withdraw_dropped
from core.storage.layout import pointer_of
from core.storage.lease import renew_lease, time_text, watch_lease
from core.storage.owner import Owner
from core.storage.store import open_store

log = logging.getLogger(__name__)


def open_run(run: Run) -> str:
    """Open the run for this execution, unless it is done or another execution works on it.

    A pipeline that meets another execution at work has nothing to do, which is not a failure: its schedule
    will start it again. A lease alone does not prove that the other one works, as it outlives a dead owner by
    up to ten minutes. So this waits until the owner renews it, or nobody holds it. A local run does not wait:
    somebody wants its result.

    Tasks, reports and readers go by the settings of the last start. One that finds all done, but the run
    measured under other settings since, makes them its own again.

    Returns:
        Who works on the run; "" if this execution does, or if the run is done.

    Raises:
        LeaseError: If another execution works on the run, and this one is a local run.
    """
    store, own = open_store(run.store), Owner.of(run.job)
    while not (is_complete := run.is_complete()) or _is_measured_otherwise(run):
        try:
            with run.working():
                withdraw_dropped(run)
                run.save()
            if is_complete:
                run.release()  # there is nothing to work on
            return ""
        except LeaseError:
            if own.pid is not None:
                raise
        if (alive := watch_lease(store, run.folder)) is not None:
            # What an earlier attempt of this task may have left: finalize is not to close the other's run.
            store.delete(pointer_of(run.job))
            return f"{alive.owner}, which renewed its lease at {time_text(alive.renewed_s)}"
    return ""


def _is_measured_otherwise(run: Run) -> bool:
    return Run.load(run.handle()).settings.measured_digest() != run.settings.measured_digest()


def show_life(handle: Mapping[str, Any]) -> None:
    """Renew the lease where a step has nothing to compute, if this execution holds it."""
    store, owner = open_store(str(handle["store"])), Owner.of(str(handle["job"]))
    with contextlib.suppress(LeaseError):  # taken over this very moment: a step that computes will say so
        renew_lease(store, f"runs/{handle['key']}", owner)
