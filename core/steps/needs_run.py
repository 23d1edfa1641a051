"""The step that decides whether anything is left to do: needs-run."""

import logging
from collections.abc import Mapping
from typing import Any

from core.runs.run import Run
from core.steps.opening import show_life

log = logging.getLogger(__name__)


def run_needs_run(*, run: Mapping[str, Any], being_done_by: str) -> bool:
    """Return whether the run is still to be done, and by this execution.

    Args:
        run: The run's handle.
        being_done_by: Which other execution works on it; "" if none does.
    """
    if being_done_by:
        log.info("run %s is being done by %s: there is nothing to do here", run["key"], being_done_by)
        return False
    show_life(run)
    done = Run.load(run).is_complete()
    log.info("run %s is done already" if done else "run %s is not done yet", run["key"])
    return not done
