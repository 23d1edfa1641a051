"""The step that says what is left to do: needs-run."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from core.pruning.phases import phase_steps
from core.runs.run import Run
from core.steps.frame import tracker_of
from core.steps.opening import show_life
from core.storage.publication import MANIFEST
from core.storage.store import open_store

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """What is left of a run, and the URIs by which the pipeline goes on."""

    phase: int
    """The first phase with work. 0 if there is nothing to do here, one more than the last if all have theirs
    behind them and the result is still to be published."""
    checkpoint_uri: str = ""
    """What that phase starts from."""
    result_uri: str = ""
    """What the last phase ends with."""
    data_uri: str = ""
    """The run's data."""


def run_needs_run(*, run: Mapping[str, Any], being_done_by: str) -> Left:
    """Return what is still to be done of the run by this execution.

    Args:
        run: The run's handle.
        being_done_by: Which other execution works on it; "" if none does.
    """
    if being_done_by:
        log.info("run %s is being done by %s: there is nothing to do here", run["key"], being_done_by)
        return Left(phase=0)
    show_life(run)
    this = Run.load(run)
    if this.is_complete():
        log.info("run %s is done already", run["key"])
        return Left(phase=0)
    first, phases = first_phase_left(this), len(this.phase_params)
    if first == 1:
        log.info("run %s is not done yet", run["key"])
    else:
        log.info("run %s: phases 1 to %d of %d are done already", run["key"], first - 1, phases)
    return Left(first, result_of(this, first - 1), result_of(this, phases), this.uri("data"))


def result_of(run: Run, phase: int) -> str:
    """Return the URI of the checkpoint that a phase ends with; of phase 0, of the base model's."""
    steps = phase_steps(run.settings.training.total_steps, len(run.phase_params))
    if phase == 0:
        return run.base_uri
    return run.phase_uri(phase, "recovered" if steps[phase - 1] else "pruned")


def first_phase_left(run: Run) -> int:
    """Return the first phase with work: all steps of those before it are published and logged.

    So are their evaluations, but for that of the phase right before it, which is made beside it.
    """
    keys = set(open_store(run.store).list(f"{run.folder}/"))

    def is_published(phase: int, step: str, uri: str) -> bool:
        return f"{run.folder}{uri.removeprefix(run.uri())}/{MANIFEST}" in keys

    if (published := _first_left(run, is_published)) == 1:
        return 1  # MLflow need not be asked: importing it takes seconds
    if (logged := tracker_of(run).logged()) is None:
        return published
    return _first_left(
        run, lambda phase, step, uri: is_published(phase, step, uri) and (phase, step) in logged
    )


def _first_left(run: Run, is_done: Callable[[int, str, str], bool]) -> int:
    """Return the first phase with work, by what is done: asked with a phase, a step and its URI."""
    last = len(run.phase_params)
    made = next(
        (p for p in range(last + 1) if not all(is_done(p, *what) for what in _made(run, p))), last + 1
    )
    measured = next((p for p in range(made) if not is_done(p, "evaluate", run.measured_uri(p))), made)
    return max(1, min(made, measured + 1))


def _made(run: Run, phase: int) -> Iterator[tuple[str, str]]:
    """Yield what a phase, 0 for what comes before all, makes beside its evaluation: steps and their URIs."""
    if phase == 0:
        yield "prepare-data", run.uri("data")
        if run.settings.evaluation.perplexity is not None:
            yield "hold-out", run.held_out_uri()
        return
    yield "calibrate", run.phase_uri(phase, "calibrated")
    yield "score-layers", run.phase_uri(phase, "scored")
    yield "prune-step", run.phase_uri(phase, "pruned")
    if (result := result_of(run, phase)) != run.phase_uri(phase, "pruned"):
        yield "recover-train", result
