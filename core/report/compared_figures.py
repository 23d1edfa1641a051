"""The figures that set runs, or rows of a table, side by side."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.report.drawing import (
    COLOURS,
    GONE,
    INK,
    KEPT,
    MARKERS,
    layer_axis,
    log_scale,
    new_figure,
    size_axis,
    styled,
)
from core.runs.record import LayerSizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW_RUNS = len(COLOURS)
"""Up to here each run has its own colour."""
_MOST_NAMES = 6
_PLAIN = {ord("$"): r"\$"}

Point = tuple[int, float, str]
"""Parameters, a measure, and what the model is called."""


@dataclass(frozen=True, kw_only=True)
class QualityPanel:
    """A measure of models of many sizes."""

    title: str
    lower_is_better: bool
    runs: Mapping[str, Sequence[Point]]
    """Name of each run to its models, the largest first."""


def pareto_front(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """Return the models that no other one beats in both size and quality, the smallest first."""
    sign = 1 if lower_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front


@styled()
def quality_against_size(panels: Sequence[QualityPanel]) -> "Figure":
    """Draw the models of all runs, and mark the Pareto front, in a panel for each measure."""
    figure = new_figure(4.2)
    names = list(dict.fromkeys(name for panel in panels for name in panel.runs))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, names)
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines() if line.get_label()[0] != "_"}
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=4 if len(names) > 2 else 3
    )
    return figure


def _draw_panel(ax: "Axes", panel: QualityPanel, names: Sequence[str]) -> None:
    points = [point for run in panel.runs.values() for point in run]
    front = pareto_front(points, lower_is_better=panel.lower_is_better)
    few = len(names) <= FEW_RUNS
    for name, run in panel.runs.items():
        place = names.index(name) % FEW_RUNS
        style: dict[str, Any] = {"color": "#9db7c9", "marker": "o", "markersize": 3.5, "linewidth": 0.7}
        if few:
            style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 5, "linewidth": 1}
            style["label"] = name.translate(_PLAIN)
        ax.plot([size for size, _, _ in run], [value for _, value, _ in run], **style)
    ring: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "--"}
    ring |= {"color": INK, "linewidth": 0.9, "markeredgewidth": 1.2, "zorder": 5}
    sizes, values, called = zip(*front, strict=True)
    ax.plot(sizes, values, label="not beaten in size and quality (Pareto front)", **ring)
    if not few:
        step = -(-len(front) // _MOST_NAMES)
        for size, value, name in list(zip(sizes, values, called, strict=True))[::step]:
            offset: dict[str, Any] = {"xytext": (6, -12 if panel.lower_is_better else 6), "fontsize": 7.5}
            offset["textcoords"] = "offset points"
            ax.annotate(name.translate(_PLAIN), (size, value), **offset)
    every = [value for _, value, _ in points]
    if panel.lower_is_better and max(every) > 4 * min(every) > 0:
        log_scale(ax)
    size_axis(ax)
    ax.set_title(panel.title)


@styled()
def widths_side_by_side(models: Mapping[str, Sequence[LayerSizes]]) -> "Figure":
    """Draw the widths of the layers of two models beside each other."""
    (first, second), names = models.values(), list(models)
    sizes = {"MLP width": "mlp_width", "query heads": "query_heads", "KV heads": "kv_heads"}
    figure = new_figure(5.2)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2.4, 1, 0.9])
    for ax, (label, size) in zip(axes, sizes.items(), strict=True):
        for layers, shift, colour, name in ((first, -0.2, KEPT, names[0]), (second, 0.2, GONE, names[1])):
            places = [i + shift for i in range(len(layers))]
            widths = [getattr(layer, size) for layer in layers]
            ax.bar(places, widths, 0.4, color=colour, label=name.translate(_PLAIN))
        ax.set_ylabel(label)
        ax.tick_params(axis="x", length=0)
    layer_axis(axes[-1], max(len(first), len(second)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, borderaxespad=0.2)
    return figure


@styled()
def rows_figure(
    lines: Mapping[str, Sequence[tuple[str, float, float]]],
    *,
    x: str,
    y: str,
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """Draw lines of (label, mean, standard deviation), and ``levels`` by name, which have no place along x.

    The x axis is numeric if all labels are numbers. Points are joined if all labels begin with a digit: there
    is nothing between two methods.
    """
    figure = new_figure(4.2)
    ax = figure.subplots()
    labels = list(dict.fromkeys(label for points in lines.values() for label, _, _ in points))
    numeric = all(re.fullmatch(r"[0-9]+([.][0-9]+)?", label) for label in labels)
    places = {label: float(label) if numeric else i for i, label in enumerate(labels)}
    for i, (name, points) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "capsize": 3}
        style["linestyle"] = "-" if all(label[:1].isdigit() for label in labels) else "none"
        across, means, spreads = zip(*((places[label], *rest) for label, *rest in points), strict=True)
        ax.errorbar(across, means, yerr=spreads, label=name.translate(_PLAIN), **style)
    if not numeric or len(labels) <= 12:
        ax.set_xticks(list(places.values()), [label.translate(_PLAIN) for label in labels])
    values = [mean for points in lines.values() for _, mean, _ in points]
    for name, level in (levels or {}).items():
        ax.axhline(level, color=INK, linewidth=0.9, linestyle="--")
        style = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 8}
        ax.text(1.0, level, name.translate(_PLAIN), **style)
        values.append(level)
    if max(values) > 10 * min(values) > 0:
        ax.set_yscale("log")
    ax.set_xlabel(x.translate(_PLAIN))
    ax.set_title(y.translate(_PLAIN))
    ax.grid(True)
    if len(lines) > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
