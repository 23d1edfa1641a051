"""Runs side by side: a table of their figures with intervals, and a page with pictures."""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.redaction import without_password
from core.report.compared_figures import (
    FEW_RUNS,
    Point,
    QualityPanel,
    quality_against_size,
    widths_side_by_side,
)
from core.report.drawing import inline_svg
from core.report.tables import COSTS, DENSE, SPEED, ResultTable, Row, figures_of
from core.report.templates import render
from core.runs.record import (
    PhaseRecord,
    RunRecord,
    accuracies,
    headline_metric,
    public_path,
    standard_error,
)

if TYPE_CHECKING:
    from core.evaluation.significance import Difference

_LABELS = ("run", "key", "base", "method", "of dense")
_BEFORE = ("params", "perplexity", "accuracy")
_NORMAL_975 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run in a comparison."""

    place: str
    """Where it is; its store may be one of several that hold it."""
    key: str
    name: str
    state: str
    """``done``, or how far it has come."""
    record: RunRecord | None
    """What it has measured; None if that cannot be read."""
    perplexity_interval: tuple[float, float] | None = None
    """95 % interval of its perplexity, where there are results of each window."""
    differences: Mapping[str, "Difference"] = field(default_factory=dict)
    """Metric to how far it is from the run that all are compared with."""
    notes: tuple[str, ...] = ()
    """What cannot be said of it, and why."""

    @property
    def shown(self) -> PhaseRecord | None:
        """The last phase that was evaluated, else the last one."""
        phases = self.record.phases if self.record else ()
        measured = [phase for phase in phases if phase.perplexity is not None or phase.tasks]
        return next(iter(measured[-1:] or phases[-1:]), None)


def comparison_table(
    runs: Sequence[ComparedRun], *, against: ComparedRun | None = None, most_tasks: int = 10**6
) -> ResultTable:
    """Return a row for each run and for each base model that they began with.

    Args:
        runs: The runs, in order.
        against: The run that differences are counted from.
        most_tasks: With more tasks, their mean alone has a column.
    """
    names = titles(runs)
    rows = [*_dense_rows(runs), *(_row(run, names[run.place]) for run in runs)]
    known = dict.fromkeys(name for row in rows for name in row.measured)
    if not any(sum(row.measured.get("gpu_seconds", ())) for row in rows):
        known.pop("gpu_seconds", None)  # no run had a GPU
    speeds = [name for name in known if name.startswith(SPEED)]
    tasks = [name for name in known if name not in {*_BEFORE, *COSTS, *speeds, "perplexity_pruned"}]
    if len(tasks) == 1:
        known.pop("accuracy", None)  # the mean of one is the same again
    elif len(tasks) > most_tasks:
        tasks = []
    metrics = [*_BEFORE, *tasks, *COSTS, *speeds]
    return ResultTable(
        title="Comparison of runs",
        subtitle=f"{len(runs)} runs of {_bases(runs)}",
        labels=_LABELS,
        metrics=tuple(metric for metric in metrics if metric in known or metric in ("params", "perplexity")),
        rows=tuple(rows),
        notes=tuple(_notes(runs, names, rows, against or runs[0])),
        against=names.get(against.place, against.name) if against else "",
    )


def comparison_page(
    runs: Sequence[ComparedRun], table: ResultTable, *, against: ComparedRun | None = None
) -> str:
    """Return the comparison as one HTML document that loads nothing from elsewhere."""
    compared = comparison_parts(runs, table, against=against)
    return render("comparison.html", title=table.title, subtitle=table.subtitle, compared=compared)


def comparison_parts(
    runs: Sequence[ComparedRun], table: ResultTable, *, against: ComparedRun | None = None
) -> dict[str, Any]:
    """Return what ``compared.html`` shows: the table, its notes and the pictures."""
    names = titles(runs)
    panels = [panel for panel in (_perplexities(runs, names), _accuracies(runs, names)) if panel.runs]
    quality = widths = ""
    if panels:
        label = "Quality against parameters of all runs and phases"
        quality = inline_svg(quality_against_size(panels), name="compared", label=label)
    ordered = sorted(runs, key=lambda run: run is not against)
    known = [(names[run.place], run.shown.layers) for run in ordered if run.shown and run.shown.layers]
    pair = dict(known[:2])
    if len(pair) == 2:
        label = "Widths of the layers of two runs"
        widths = inline_svg(widths_side_by_side(pair), name="pair", label=label)
    return {
        "against": table.against,
        "columns": table.columns(),
        "notes": table.notes,
        "quality": quality,
        "widths": widths,
        "pair": list(pair),
        "many": len(names) > FEW_RUNS,
    }


def titles(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Return the place of each run to its name, with the key or the place where several have that name."""
    names = {run.place: run.name for run in runs}
    with_key = {run.place: f"{run.name} {run.key[:6]}".strip() for run in runs}
    with_place = {run.place: f"{run.name} in {without_password(run.place)}".strip() for run in runs}
    for longer in (with_key, with_place):
        often = Counter(names.values())
        names = {place: name if name and often[name] == 1 else longer[place] for place, name in names.items()}
    return names


def _row(run: ComparedRun, name: str) -> Row:
    record, phase = run.record, run.shown
    labels = {"run": name, "key": run.key}
    if record is None or phase is None:
        return Row(labels=labels)
    labels["base"] = public_path(record.base)
    labels["method"] = str(record.settings.get("prune", {}).get("method", ""))
    labels["of dense"] = f"{100 * phase.params / record.phases[0].params:.1f} %"
    # Its speed was measured of the result.
    seen = dataclasses.replace(record, phases=record.phases[: record.phases.index(phase) + 1])
    figures = figures_of(seen, phase)
    if phase is not record.phases[-1]:
        figures = {name: value for name, value in figures.items() if not name.startswith(SPEED)}
    intervals = _task_intervals(phase)
    if run.perplexity_interval is not None:
        intervals["perplexity"] = run.perplexity_interval
    return Row(
        labels=labels,
        measured={name: [value] for name, value in figures.items()},
        intervals={name: ends for name, ends in intervals.items() if name in figures},
        differences=run.differences,
    )


def _dense_rows(runs: Sequence[ComparedRun]) -> Iterator[Row]:
    """Yield a row for each base model under each way of measuring it."""
    seen = set()
    for run in runs:
        if run.record is None or not run.record.phases:
            continue
        dense = run.record.phases[0]
        figures = figures_of(run.record, dense)
        measured = {name: [figures[name]] for name in figures if name not in COSTS and name[:9] != SPEED[:9]}
        place = (run.record.base, run.record.revision, str(measured))
        if place not in seen:
            seen.add(place)
            labels = {"run": DENSE, "base": public_path(run.record.base), "of dense": "100.0 %"}
            yield Row(labels=labels, measured=measured, intervals=_task_intervals(dense))


def _task_intervals(phase: PhaseRecord) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals that follow from standard errors, of each task and of the mean."""
    found, errors, right = {}, dict[str, float](), accuracies(phase)
    for task, metrics in phase.tasks.items():
        best = headline_metric(metrics)
        error = standard_error(metrics, best[0]) if best else None
        if best and error and math.isfinite(error):
            errors[task] = error
            found[task] = (best[1] - _NORMAL_975 * error, best[1] + _NORMAL_975 * error)
    if right and right.keys() <= errors.keys():
        mean = statistics.fmean(right.values())
        error = math.hypot(*(errors[task] for task in right)) / len(right)
        found["accuracy"] = (mean - _NORMAL_975 * error, mean + _NORMAL_975 * error)
    return found


def _notes(
    runs: Sequence[ComparedRun], names: Mapping[str, str], rows: Sequence[Row], first: ComparedRun
) -> Iterator[str]:
    if any(row.intervals for row in rows):
        yield "Brackets hold 95 % intervals; seconds are the wall-clock time of the run's steps."
    if any(sum(row.measured.get("gpu_seconds", ())) for row in rows):
        yield "GPU-seconds are the seconds of each step times the GPUs that it ran on."
    if any(row.differences for row in rows):
        yield (
            "Differences come from a paired bootstrap over the items that both runs have answered. Of 20 "
            "comparisons of equal models, about one shows a difference."
        )
    for run in runs:
        phase = run.shown
        if phase is None:
            yield f"{names[run.place]}: {run.state}; nothing of it can be shown."
        elif phase.perplexity is None and not phase.tasks:
            yield f"{names[run.place]}: {run.state}; not evaluated."
        elif run.state != "done":
            yield f"{names[run.place]}: {run.state}; its figures are those of phase {phase.phase}."
        yield from (f"{names[run.place]}: {note}" for note in run.notes)
    averaged = {tuple(sorted(accuracies(run.shown))) for run in runs if run.shown} - {()}
    if len(averaged) > 1:
        common = sorted(set.intersection(*map(set, averaged)))
        yield (
            "The mean accuracy of a run is that of its own tasks, which differ; a difference is that of the "
            f"tasks that both have, and a picture's of those that all have: {', '.join(common) or 'none'}."
        )
    if others := [names[run.place] for run in runs if _way(run) not in (None, _way(first))]:
        yield (
            f"Measured under other settings than {names[first.place]}, so not comparable without care: "
            f"{', '.join(others)}."
        )


def _way(run: ComparedRun) -> str | None:
    """Return how a run was measured; None if it says nothing."""
    if run.record is None or "evaluation" not in run.record.settings:
        return None
    evaluation = run.record.settings["evaluation"]
    how = ("batch_size", "every", "ranks", "speed")
    alike = {name: value for name, value in evaluation.items() if name not in how}
    return repr(sorted(alike.items()))


def _bases(runs: Sequence[ComparedRun]) -> str:
    bases = list(dict.fromkeys(public_path(run.record.base) for run in runs if run.record))
    return ", ".join(bases[:3]) + (f" and {len(bases) - 3} more" if len(bases) > 3 else "") or "no known base"


def _perplexities(runs: Sequence[ComparedRun], names: Mapping[str, str]) -> QualityPanel:
    found: dict[str, list[Point]] = {}
    for run in runs:
        for phase in run.record.phases if run.record else ():
            if phase.perplexity is not None and math.isfinite(phase.perplexity):
                point = (phase.params, phase.perplexity, _called(names[run.place], phase))
                found.setdefault(names[run.place], []).append(point)
    return QualityPanel(title="perplexity (lower is better)", lower_is_better=True, runs=found)


def _accuracies(runs: Sequence[ComparedRun], names: Mapping[str, str]) -> QualityPanel:
    """Return the mean accuracies over the tasks that all runs with tasks have."""
    known = [set(accuracies(run.shown)) for run in runs if run.shown and accuracies(run.shown)]
    common = set.intersection(*known) if known else set()
    found: dict[str, list[Point]] = {}
    for run in runs:
        for phase in run.record.phases if run.record and common else ():
            right = accuracies(phase)
            if common <= right.keys():
                mean = 100 * statistics.fmean(right[task] for task in sorted(common))
                point = (phase.params, mean, _called(names[run.place], phase))
                found.setdefault(names[run.place], []).append(point)
    of = f"mean accuracy of {len(common)} tasks" if len(common) > 1 else f"accuracy, {''.join(common)}"
    title = f"{of}, % (higher is better)".replace("$", r"\$")
    return QualityPanel(title=title, lower_is_better=False, runs=found)


def _called(name: str, phase: PhaseRecord) -> str:
    return f"{name}, phase {phase.phase}" if phase.phase else DENSE
