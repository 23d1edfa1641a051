"""A table of results: figures by what was varied, as Markdown, CSV, JSON and a page with a picture.

Whoever has runs to set side by side makes the rows; nothing here knows where they come from.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.quantities import count_text, parse_count, seconds_text
from core.report.compared_figures import rows_figure
from core.report.drawing import inline_svg
from core.report.summary import escaped
from core.report.templates import render
from core.runs.record import PhaseRecord, RunRecord, accuracies, headline_metric, perplexity_text

if TYPE_CHECKING:
    from core.evaluation.significance import Difference

RUN_METRICS = ("params", "tokens", "perplexity", "perplexity_pruned", "accuracy", "seconds", "gpu_seconds")
"""Metrics that a run has whatever its tasks are; ``figures_of`` says what they are."""
COSTS = ("tokens", "seconds", "gpu_seconds")
"""Those of them that say what a run took, and nothing of the model."""
_COUNTS = ("params", "tokens")
_NATS = ("loss_increase",)
_TITLES = {
    "params": "parameters",
    "accuracy": "mean accuracy",
    "gpu_seconds": "GPU-seconds",
    "loss_increase": "loss increase, nats a token",
}
DENSE = "dense"
"""The label of the base model."""
SPEED = "speed in "
"""Begins the name of the metric of a runtime: how many times faster than the base model it decodes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured in one place of the table."""

    labels: Mapping[str, str]
    """Name of a label's column to the label; a column that does not apply is left out."""
    measured: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Metric to its value in each repetition that is done."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Metric to what others have published for it, as they print it: accuracies in percent."""
    repetitions: tuple[int, int] = (1, 1)
    """How many are done, and how many were asked for."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric to its 95 % interval."""
    differences: Mapping[str, "Difference"] = field(default_factory=dict)
    """Metric to how far it is from the row that all are compared with."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Which columns a picture shows."""

    x: str
    """Name of a label's column."""
    y: str
    """A metric."""
    by: str = ""
    """Name of the label's column that has a line for each label; "" draws one line."""


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """Rows, and how to show them."""

    title: str
    subtitle: str = ""
    labels: tuple[str, ...]
    """Names of the labels' columns."""
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Sentences below it."""
    picture: Picture | None = None
    against: str = ""
    """What the row is called that differences are counted from."""

    def columns(self) -> dict[str, list[str]]:
        """Return header to one text a row: labels, repetitions, each metric, beside it what was published."""
        rows = self.rows
        found = {name: [row.labels.get(name, "") for row in rows] for name in self.labels}
        if any(row.repetitions != (1, 1) for row in rows):
            found["done"] = [f"{done} of {asked}" for done, asked in (row.repetitions for row in rows)]
        for metric in self.metrics:
            header, plain = self._header(metric), self._is_plain(metric)
            found[header] = [
                value_text(metric, row.measured.get(metric, ()), row.intervals.get(metric), plain=plain)
                for row in rows
            ]
            if any(metric in row.differences for row in rows):
                differences = [row.differences.get(metric) for row in rows]
                found[f"{header}\nagainst {self.against}"] = [
                    "-" if each is None else difference_text(metric, each) for each in differences
                ]
            if any(metric in row.published for row in rows):
                published = [self._published(row, metric) for row in rows]
                texts = [
                    "-" if value is None else value_text(metric, [value], plain=plain) for value in published
                ]
                found[f"{header}, published"] = texts
        return found

    def markdown(self) -> str:
        """Return the table in Markdown."""
        columns = self.columns()
        sides = [":---" if name in self.labels else "---:" for name in columns]
        rows = [
            map(escaped, columns),
            sides,
            *(map(escaped, row) for row in zip(*columns.values(), strict=True)),
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        notes = "\n".join(f"* {escaped(note)}" for note in self.notes)
        parts = (f"# {escaped(self.title)}", escaped(self.subtitle), table, notes)
        return "\n\n".join(filter(None, parts)) + "\n"

    def csv(self) -> str:
        """Return the table as numbers: of each metric mean, standard deviation and what was published.

        Where there are any, the ends of intervals and the differences follow.
        """
        ends = {"mean": "", "spread": "_spread", "published": "_published", "low": "_low", "high": "_high"}
        ends |= {f"difference{end}": f"_difference{end}" for end in ("", "_low", "_high")}
        ends |= {"verdict": "_verdict"}
        summaries = [{metric: self._summary(row, metric) for metric in self.metrics} for row in self.rows]
        columns = [
            (metric, key)
            for metric in self.metrics
            for key in ends
            if key in ("mean", "spread", "published") or any(key in each[metric] for each in summaries)
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*self.labels, "done", "asked", *(f"{metric}{ends[key]}" for metric, key in columns)])
        for row, found in zip(self.rows, summaries, strict=True):
            labels = (row.labels.get(name, "") for name in self.labels)
            writer.writerow([*labels, *row.repetitions, *(found[metric].get(key) for metric, key in columns)])
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON holds it, with the value of each repetition."""
        rows = [
            {
                "labels": dict(row.labels),
                "done": row.repetitions[0],
                "asked": row.repetitions[1],
                "metrics": {metric: self._summary(row, metric) for metric in self.metrics},
            }
            for row in self.rows
        ]
        return {"title": self.title, "subtitle": self.subtitle, "rows": rows, "notes": list(self.notes)}

    def svg(self) -> str:
        """Return the picture; "" if there is none, or nothing to show in it."""
        lines = self._lines()
        if self.picture is None or not lines:
            return ""
        shown = self._header(self.picture.y)
        figure = rows_figure(lines, x=self.picture.x, y=shown, levels=self._levels())
        label = f"{shown} against {self.picture.x}"
        return inline_svg(figure, name="comparison", label=label.replace('"', "'"))

    def html(self) -> str:
        """Return the table and its picture as one page that loads nothing from elsewhere."""
        values = {"title": self.title, "subtitle": self.subtitle, "notes": self.notes}
        return render("table.html", **values, columns=self.columns(), picture=self.svg())

    def write(self, folder: Path) -> list[str]:
        """Write the table in each format, and its picture if there is one; return the names of the files."""
        contents = {
            "table.md": self.markdown(),
            "table.csv": self.csv(),
            "table.json": json.dumps(self.to_dict(), indent=1) + "\n",
            "table.html": self.html(),
            "table.svg": self.svg(),
        }
        for name, content in contents.items():
            if content:
                (folder / name).write_text(content)
            else:  # what an earlier table showed
                (folder / name).unlink(missing_ok=True)
        return [name for name, content in contents.items() if content]

    def _lines(self) -> dict[str, list[tuple[str, float, float]]]:
        """Return line to points of label, mean and standard deviation; what was published has its own."""
        lines: dict[str, list[tuple[str, float, float]]] = {}
        if (picture := self.picture) is None:
            return lines
        shown = 1.0 if self._is_plain(picture.y) else 100.0
        for row in self.rows:
            name, summary = row.labels.get(picture.by, ""), self._summary(row, picture.y)
            if self._base_model(row):
                continue
            for line, value in ((name, summary["mean"]), (f"{name} (published)", summary["published"])):
                if value is not None and picture.x in row.labels:
                    spread = 0.0 if line != name else summary["spread"] or 0.0
                    points = lines.setdefault(line.strip(), [])
                    points.append((row.labels[picture.x], shown * value, shown * spread))
        return lines

    def _levels(self) -> dict[str, float]:
        """Return what the picture shows of base models that have no place along its x axis."""
        assert self.picture is not None
        shown = 1.0 if self._is_plain(self.picture.y) else 100.0
        means = {
            self._base_model(row): self._summary(row, self.picture.y)["mean"]
            for row in self.rows
            if self._base_model(row)
        }
        return {name: shown * mean for name, mean in means.items() if mean is not None}

    def _base_model(self, row: Row) -> str:
        """Return what a base model is called whose row has no place along the picture's x axis; else ""."""
        assert self.picture is not None
        place = row.labels.get(self.picture.x, "")
        names = [label for label in row.labels.values() if label.split(" ")[0] == DENSE]
        return names[0] if names and place in ("", names[0]) else ""

    def _is_plain(self, metric: str) -> bool:
        """Return whether a metric is shown as it is, and not in percent; above 1, a task's is no share."""
        return (
            metric in (*_COUNTS, *_NATS, "seconds", "gpu_seconds")
            or metric.startswith(SPEED)
            or "perplexity" in metric
            or "wikitext" in metric
            or any(value > 1 for row in self.rows for value in row.measured.get(metric, ()))
        )

    def _header(self, metric: str) -> str:
        title = _TITLES.get(metric, metric.replace("perplexity_", "perplexity, "))
        return title if self._is_plain(metric) else f"{title}, %"

    def _published(self, row: Row, metric: str) -> float | None:
        """Return what was published for a row, in the unit of what was measured."""
        value = row.published.get(metric)
        return value if value is None or self._is_plain(metric) else value / 100

    def _summary(self, row: Row, metric: str) -> dict[str, Any]:
        """Return what JSON holds of a metric; None for what there is not."""
        values = row.measured.get(metric, ())
        mean = statistics.fmean(values) if values else math.nan
        found: dict[str, Any] = {
            "mean": _finite(mean),
            "spread": _spread(values),
            "values": list(map(_finite, values)),
            "published": self._published(row, metric),
        }
        if metric in row.intervals:
            found["low"], found["high"] = map(_finite, row.intervals[metric])
        if difference := row.differences.get(metric):
            found |= {
                "difference": _finite(difference.value),
                "difference_low": _finite(difference.low),
                "difference_high": _finite(difference.high),
                "verdict": difference.verdict,
            }
        return found


def figures_of(record: RunRecord, phase: PhaseRecord) -> dict[str, float]:
    """Return the metrics of a phase: sizes, perplexities, each task's headline metric, their mean, time.

    Tokens, also those of masks, distillation and the teacher's own training, and seconds are those of the run
    up to the phase; GPU-seconds are those of each step times the accelerators that it took. What was not
    measured is left out.
    """
    before = [each for each in record.phases if each.phase <= phase.phase]
    others = sum(each.distillation.tokens for each in before if each.distillation)
    others += sum(each.mask_tokens + each.teacher_tokens for each in before)
    found = {
        "params": float(phase.params),
        "perplexity": phase.perplexity,
        "perplexity_pruned": phase.perplexity_pruned,
        "tokens": float(sum(each.tokens for each in before) + others),
        "seconds": sum(sum(each.seconds.values()) for each in before),
    }
    on_gpus = [each.gpu_seconds for each in before]
    if None not in on_gpus:
        found["gpu_seconds"] = sum(seconds or 0.0 for seconds in on_gpus)
    if right := accuracies(phase):
        found["accuracy"] = statistics.fmean(right.values())
    best = {task: headline_metric(metrics) for task, metrics in phase.tasks.items()}
    found |= {task: metric[1] for task, metric in best.items() if metric is not None}
    if phase is record.phases[-1]:
        for speed in record.speed:
            jobs = [job for job in speed.speedups if job.startswith("decode")]
            found |= {f"{SPEED}{speed.runtime}": speed.speedups[job] for job in jobs[:1]}
    return {name: value for name, value in found.items() if value is not None}


def published_value(metric: str, text: str) -> float:
    """Read a figure as papers print it: 6.66B parameters, a perplexity, an accuracy in percent.

    Raises:
        ValueError: If it is none.
    """
    return float(parse_count(text) if metric in _COUNTS else text)


def difference_text(metric: str, difference: "Difference") -> str:
    """Write a difference with its interval, and whether it is one: +1.2 [-0.4, +2.8], no difference shown."""
    same = 1.0 if "perplexity" in metric else 0.0  # perplexities are compared by their ratio
    ends = (difference.value, difference.low, difference.high)
    value, low, high = (f"{100 * (end - same):+.1f}" for end in ends)
    unit = " %" if "perplexity" in metric else ""
    left_out = f" ({difference.left_out:,} left out)" if difference.left_out else ""
    return f"{value}{unit} [{low}, {high}], {difference.verdict}{left_out}"


def value_text(
    metric: str, values: Sequence[float], interval: tuple[float, float] | None = None, *, plain: bool
) -> str:
    """Write the mean of a metric, and its interval or standard deviation; a dash for no value.

    What is not ``plain`` is a share, and written in percent.
    """
    if values and interval is not None:
        first, low, high = (value_text(metric, [value], plain=plain) for value in (values[0], *interval))
        return f"{first} [{low}, {high}]"
    if not values:
        return "-"
    mean, spread = statistics.fmean(values), _spread(values)
    if metric in _COUNTS:
        return count_text(round(mean))
    if metric == "seconds":
        return seconds_text(mean)
    if metric == "gpu_seconds":
        return f"{mean:,.0f}"
    if metric.startswith(SPEED):
        return f"{mean:.2f}"
    if metric in _NATS:
        return f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
    if not plain:
        return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")
    decimals = 2 if mean < 99.995 else 0  # as the mean has
    return perplexity_text(mean) + (f" ± {spread:,.{decimals}f}" if spread is not None else "")


def _spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation; None of fewer than two values, or of infinite ones."""
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if finite else None


def _finite(value: float) -> float | None:
    """Return a number as JSON knows it."""
    return value if math.isfinite(value) else None
