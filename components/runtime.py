"""The frame of every task: live log lines, the time taken, and one-line errors.

A component's body imports this inside the task, so it must import neither kfp nor torch, which reads on
import what is set here.
"""

import contextlib
import gc
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from core.errors import AdaptPrunerError, full_disk
from core.machine.cores import use_own_cores
from core.quantities import seconds_text
from core.redaction import one_line
from core.storage.owner import LOCAL

log = logging.getLogger(__name__)

_QUIET = {
    # Bars rewrite their line; in a log every rewrite would be a line of its own.
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

# Importing torch, transformers and mlflow makes a million objects that stay. Looking for garbage among them
# as often as Python does by default costs more than a second a task.
_GC_THRESHOLD = 100_000


_TERMINATION_LOG = Path("/dev/termination-log")
_TERMINATION_LOG_BYTES = 4096  # the kubelet drops what is beyond


def quiet_libraries() -> None:
    """Keep the bars of libraries out of the output, unless the environment asks for them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def task(step: str, phase: int | None = None) -> Iterator[None]:
    """Run a step as a task: our log goes to stderr, each line with the phase and the step.

    A process that an error ends prints ``error: <text>`` last. A traceback comes before it unless the error
    is one that is meant for the user. In a pod Kubernetes gets the same text.

    Args:
        step: The component's name, such as ``recover-train``.
        phase: The phase, 0 for the dense model; None for a step that runs once.
    """
    where = step if phase is None else f"phase {phase} {step}"
    quiet_libraries()
    use_own_cores()
    gc.set_threshold(_GC_THRESHOLD)
    if os.environ.get(LOCAL):
        threading.Thread(target=_end_with_the_run, daemon=True).start()
    started = time.monotonic()
    with _log_to_stderr(where):
        log.info("started")
        try:
            yield
        except Exception:
            sys.excepthook = _print_error
            raise
        log.info("done in %s", seconds_text(time.monotonic() - started))
    # At exit Python would look for garbage among the objects of torch and transformers, which takes 2 s.
    gc.freeze()


@contextlib.contextmanager
def _log_to_stderr(where: str) -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {where}: %(message)s", "%H:%M:%S"))
    loggers = [logging.getLogger(name) for name in ("core", "components")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    root = logging.getLogger()
    level_of_root = root.level
    # kfp's executor logs at the root from INFO on, and botocore would log each time where its keys are from.
    root.setLevel(max(level_of_root, logging.WARNING))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # kfp's executor logs at the root, too: each line would come twice
    try:
        yield
    finally:
        root.setLevel(level_of_root)
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    error = full_disk(error) or error
    if isinstance(error, AdaptPrunerError):
        lines = str(error).splitlines()
    else:
        sys.__excepthook__(kind, error, traceback)
        lines = [one_line(f"{kind.__name__}: {' '.join(str(error).split())}")]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    _tell_kubernetes(" ".join(f"error: {line}" for line in lines))


def _tell_kubernetes(text: str) -> None:
    """Write why a task has failed to where the kubelet looks: it becomes part of the state of the pod."""
    if "KUBERNETES_SERVICE_HOST" in os.environ and _TERMINATION_LOG.is_file():
        content = text.encode()[:_TERMINATION_LOG_BYTES].decode(errors="ignore")
        with contextlib.suppress(OSError):
            _TERMINATION_LOG.write_text(content)


def _end_with_the_run() -> None:
    """Watch the pipe to the process that reads our output, and end when that process is gone.

    A local run that is killed would else leave its task behind, and the next run would write beside it.
    """
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)  # errors only: there is no reader any more
    pipe.poll()
    os._exit(1)
