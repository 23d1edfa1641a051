"""How far a run has come and how long it may still take, from what lies in its store."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import StorageError
from core.pruning.phases import phase_steps
from core.runs.finding import StoredRun
from core.runs.run import Run
from core.storage.interface import join_uri
from core.storage.layout import REPORT, RESUME, STEPS, TRAINING_STATE
from core.storage.publication import MANIFEST, find_publication
from core.storage.store import open_store

_Done = dict[tuple[int, str], float]
"""Phase and step, as in ``STEPS``, to the seconds it took."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Where a run stands."""

    phase: int
    """The phase that is worked on, 0 before the first."""
    step: str
    """The step that is worked on; "" if all is done."""
    trained: int
    """Optimizer steps that are done, up to the last training state."""
    to_train: int
    """Optimizer steps of all phases."""
    loss: float | None
    """The last training loss that the store knows."""
    share: float
    """Steps that are done, of all; optimizer steps count within a training."""
    seconds_left: float | None
    """How long it will take, judged by what is done; None before each kind of step has been seen."""


def watched(stored: StoredRun) -> Watched | None:
    """Return where a run stands; None if it is damaged.

    Raises:
        StorageError: If the store cannot be read.
    """
    run = stored.run
    if run is None:
        return None
    phases = len(run.phase_params)
    steps = phase_steps(run.settings.training.total_steps, phases)
    if stored.overview.state == "done":
        total = sum(steps)
        return Watched(
            phase=phases, step="", trained=total, to_train=total, loss=None, share=1.0, seconds_left=0.0
        )
    done = _done(run)
    order = list(_order(steps))
    missing = [at for at in order if at not in done]
    # evaluate stands beside the next phase: what is worked on is the first step that others wait for.
    phase, step = next((at for at in missing if at[1] != "evaluated" or at[0] == phases), (phases, "publish"))
    if missing and missing[0] == (0, "evaluated"):
        phase, step = missing[0]
    in_training, training_s, loss = 0, 0.0, None
    if step == "recovered":
        in_training, training_s, loss = _saved(run, phase, first=sum(steps[: phase - 1]))
    if loss is None and (last := max((p for p, name in done if name == "recovered"), default=0)):
        loss = _last_loss(run, last)
    trained = sum(steps[p - 1] for p, name in done if name == "recovered") + in_training
    part = in_training / steps[phase - 1] if in_training else 0.0
    return Watched(
        phase=phase,
        step=STEPS.get(step, step),
        trained=trained,
        to_train=sum(steps),
        loss=loss,
        share=(len(order) - len(missing) + part) / (len(order) + 1),
        seconds_left=_left(missing, done, steps, in_training, training_s),
    )


def _order(steps: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    yield from ((0, "prepare-data"), (0, "evaluated"))
    for phase, trained in enumerate(steps, start=1):
        yield from ((phase, step) for step in STEPS if trained or step != "recovered")


def _done(run: Run) -> _Done:
    """Return the steps that are published, with their seconds."""
    store = open_store(run.store)
    places = {(0, "prepare-data"): run.uri("data"), (0, "evaluated"): run.measured_uri(0)}
    for phase in range(1, len(run.phase_params) + 1):
        places |= {(phase, step): run.phase_uri(phase, step) for step in STEPS}
        places[phase, "evaluated"] = run.measured_uri(phase)
    there = {key for key in store.list(f"{run.folder}/") if key.endswith(MANIFEST)}
    found = {}
    for at, uri in places.items():
        if f"{uri.removeprefix(f'{run.store}/')}/{MANIFEST}" in there:
            published = find_publication(uri)
            found[at] = float(published.read_json(REPORT).get("seconds", 0.0)) if published else 0.0
    return found


def _saved(run: Run, phase: int, *, first: int) -> tuple[int, float, float | None]:
    """Return the optimizer steps, the seconds and the last loss of the newest training state of a phase."""
    uri = join_uri(run.phase_uri(phase, "recovered"), RESUME)
    for key in sorted(open_store(uri).list(), reverse=True):
        place, _, name = key.partition("/")
        if name == MANIFEST:
            # It may be replaced by a newer one at this moment.
            with contextlib.suppress(StorageError):
                published = find_publication(join_uri(uri, place))
                progress = published.read_json(TRAINING_STATE)["progress"] if published else {}
                losses = progress.get("losses", ())
                if losses:
                    return losses[-1][0] + 1 - first, float(progress["seconds"]), float(losses[-1][1])
    return 0, 0.0, None


def _last_loss(run: Run, phase: int) -> float | None:
    published = find_publication(run.phase_uri(phase, "recovered"))
    losses = published.read_json(REPORT).get("losses", ()) if published else ()
    return float(losses[-1][1]) if losses else None


def _left(
    missing: list[tuple[int, str]], done: _Done, steps: tuple[int, ...], in_training: int, training_s: float
) -> float | None:
    """Return the seconds that the missing steps will take, each kind as long as it took last."""
    took = {step: seconds for (_, step), seconds in sorted(done.items()) if step != "recovered"}
    trained = sum(steps[phase - 1] for phase, step in done if step == "recovered") + in_training
    spent = sum(seconds for (_, step), seconds in done.items() if step == "recovered") + training_s
    seconds = 0.0
    for phase, step in missing:
        if step == "recovered":
            if not trained:
                return None
            seconds += (steps[phase - 1] - in_training) * spent / trained
            in_training = 0  # of the first phase that is missing
        elif step in took:
            seconds += took[step]
        else:
            return None
    return seconds
