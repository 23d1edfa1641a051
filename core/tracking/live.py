"""Curves on their way to MLflow while they grow, from a thread that the work never waits for."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from core.errors import TrackingError
from core.tracking.client import CurveLog, connect, explained

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Name of each curve to its (step, value)."""

_EVERY_S = 10.0


@contextmanager
def logging_live(
    uri: str, run_id: str, curves: Callable[[], Curves], *, every_s: float = _EVERY_S
) -> Iterator[None]:
    """Log what ``curves`` returns onto a run every few seconds, and once more when the block ends.

    A server that does not answer is warned about once and asked again later; whoever logs the result of the
    block logs what is missing. The end of the block waits for a request under way, so that it cannot arrive
    after that: at most half a minute.

    Args:
        uri: Tracking URI.
        run_id: Of the run; "" logs nothing.
        curves: Is called in another thread.
        every_s: How often.
    """
    if not run_id:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_keep_logging, args=(uri, run_id, curves, every_s, ended), name="live-curves", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _keep_logging(
    uri: str, run_id: str, curves: Callable[[], Curves], every_s: float, ended: threading.Event
) -> None:
    client: MlflowClient | None = None
    logged: CurveLog | None = None
    warned = False
    while True:
        is_last = ended.wait(every_s)
        if is_last and warned and logged is None:
            return  # it did not answer a moment ago
        try:
            with explained(uri):
                client = client or connect(uri)
                logged = logged or CurveLog(client, run_id)
                logged.log(curves())
        except TrackingError as error:
            logged = None  # some of it may have arrived: what is there is asked for again
            if not warned:
                log.warning("training goes on, but its curves are not in MLflow until its end: %s", error)
            warned = True
        if is_last:
            return
