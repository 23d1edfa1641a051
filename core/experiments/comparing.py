"""Runs of stores set side by side, with the significance of their differences."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from core.errors import AdaptPrunerError, DataError
from core.evaluation.items import Items, read_items
from core.evaluation.observed import can_be_averaged, observed, observed_text
from core.evaluation.significance import Difference, Observations, perplexity_ratio, score_difference
from core.report.comparison import ComparedRun
from core.runs.finding import StoredRun
from core.runs.record import accuracies, headline_metric
from core.storage.publication import find_publication
from core.storage.transfer import in_parallel

_TEXT = "perplexity"


def compare_runs(
    runs: Sequence[StoredRun], *, against: StoredRun | None = None
) -> tuple[list[ComparedRun], ComparedRun | None]:
    """Return what runs have measured, with their differences from the run ``against``; and that run.

    It comes first, if it is not one of them. What cannot be read of a run, or cannot be compared, is a note.
    """
    chosen = list(runs)
    if against is not None and all(run.place != against.place for run in runs):
        chosen.insert(0, against)
    found = in_parallel(_read, chosen)
    other = next((each for each in found if against and each[0].place == against.place), None)
    compared = [_compared(*each, other=other) for each in found]
    return compared, compared[found.index(other)] if other else None


_Read = tuple[ComparedRun, Items | None]


def _read(stored: StoredRun) -> _Read:
    seen = stored.overview
    try:
        record, problem = stored.record(), () if stored.run else ("its run.json is damaged",)
    except AdaptPrunerError as error:
        record, problem = None, (str(error),)
    run = ComparedRun(
        place=stored.place,
        key=seen.key,
        name=seen.name,
        state=stored.state,
        record=record,
        notes=problem,
    )
    items = None
    if stored.run is not None and run.shown is not None:
        try:
            published = find_publication(stored.run.measured_uri(run.shown.phase))
            items = read_items(published) if published else None
        except AdaptPrunerError as error:
            run = dataclasses.replace(run, notes=(*run.notes, str(error)))
    return run, items


def _compared(run: ComparedRun, items: Items | None, *, other: _Read | None) -> ComparedRun:
    if items is not None and (text := observed_text(items, _TEXT)) is not None:
        certain = Observations(ids=text.ids, values=[0.0] * len(text.ids), weights=text.weights)
        itself = perplexity_ratio(text, certain)  # of which the perplexity is 1
        run = dataclasses.replace(run, perplexity_interval=(itself.low, itself.high))
    if other is None or other[0].place == run.place:
        return run
    reference, others = other
    if items is None or others is None:
        missing = [name for name, has in ((run.name, items), (reference.name, others)) if has is None]
        note = f"no difference is shown, as there are no results of each item of {' and '.join(missing)}"
        return dataclasses.replace(run, notes=(*run.notes, note))
    own_scores, other_scores = _scores(run, items), _scores(reference, others)
    pairs = {task: (own_scores[task], other_scores[task]) for task in own_scores if task in other_scores}
    averaged = [task for task in accuracies(run.shown) if task in pairs] if run.shown else []
    if len(averaged) > 1 and can_be_averaged(items, {task: own_scores[task] for task in averaged}):
        pairs["accuracy"] = _joined(own_scores, averaged), _joined(other_scores, averaged)
    differences, notes = dict[str, Difference](), list(run.notes)
    for name, pair in pairs.items():
        try:
            differences[name] = score_difference(*pair)
        except DataError as error:
            notes.append(str(error))
    if (text := observed_text(items, _TEXT)) is not None and (
        other_text := observed_text(others, _TEXT)
    ) is not None:
        try:
            differences[_TEXT] = perplexity_ratio(text, other_text)
        except DataError as error:
            notes.append(str(error))
    return dataclasses.replace(run, differences=differences, notes=tuple(notes))


def _joined(
    scores: Mapping[str, Mapping[str, Observations]], tasks: Iterable[str]
) -> dict[str, Observations]:
    return {task: scores[task][task] for task in tasks}


def _scores(run: ComparedRun, items: Items) -> dict[str, dict[str, Observations]]:
    """Return each task of a run to the items of its headline metric, under its own name.

    A group whose members count alike has a list for each member. A metric that is no mean is left out.
    """
    found = {}
    for task, metrics in run.shown.tasks.items() if run.shown else ():
        best = headline_metric(metrics)
        if best is not None and (scores := observed(items, task, best[0])):
            found[task] = scores
    return found
