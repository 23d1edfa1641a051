"""The figures of a run."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.report.drawing import (
    COLOURS,
    DENSE,
    GONE,
    INK,
    KEPT,
    MARKERS,
    RATE,
    layer_axis,
    log_scale,
    new_figure,
    size_axis,
    sparse,
    styled,
)
from core.runs.record import PhaseRecord, RunRecord, accuracies, perplexity_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW_PHASES = 4  # up to here phases have names and cells have numbers
_MANY_LAYERS = 48  # above this, bars and cells are too narrow for numbers


@styled()
def widths_figure(record: RunRecord) -> "Figure":
    """Draw what every layer keeps and what each phase removes: MLP channels, query heads, KV heads."""
    phases = record.phases
    rows = {"MLP width": "mlp_width", "query heads": "query_heads", "KV heads": "kv_heads"}
    if all(sizes.kv_heads == sizes.query_heads for sizes in phases[0].layers):
        rows = {"MLP width": "mlp_width", "heads": "query_heads"}
    ratios = [3.2, 1.0, 0.7][: len(rows)]
    figure = new_figure(0.9 + sum(ratios))
    axes = figure.subplots(len(rows), 1, sharex=True, height_ratios=ratios)
    for (label, size), ax in zip(rows.items(), axes, strict=True):
        _stack(ax, [[getattr(sizes, size) for sizes in phase.layers] for phase in phases])
        ax.set_ylabel(label)
    if len(phases[0].layers) <= _MANY_LAYERS:
        _number_bars(axes[0], [sizes.mlp_width for sizes in phases[-1].layers])
    layer_axis(axes[-1], len(phases[0].layers))
    _phase_key(figure, list(axes), phases)
    return figure


def _number_bars(ax: "Axes", sizes: Sequence[int]) -> None:
    """Write each size at the foot of its bar, or on top of a bar that is too low to hold it."""
    top = ax.get_ylim()[1]
    for i, size in enumerate(sizes):
        bottom, colour = (0, "white") if size > 0.15 * top else (size, "black")
        style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8}
        ax.text(i, bottom + 0.02 * top, str(size), color=colour, **style)


def _stack(ax: "Axes", sizes: Sequence[Sequence[int]]) -> None:
    """Stack bars a layer: the last phase's size, then what each phase removed, up to the dense size.

    ``sizes`` are by phase (dense first) and layer.
    """
    floor = [0] * len(sizes[0])
    _bars(ax, floor, sizes[-1], facecolor=KEPT, edgecolor="none")
    for before, after, colour in zip(sizes, sizes[1:], _phase_colours(len(sizes) - 1), strict=False):
        _bars(ax, after, before, facecolor=colour, edgecolor="none")
    _bars(ax, floor, sizes[0], facecolor="none", edgecolor=DENSE, linewidth=0.7)
    top = max(sizes[0])
    if top <= 16:  # a line a head, so that heads can be counted
        ax.hlines(range(1, top), -0.4, len(sizes[0]) - 0.6, color="white", linewidth=0.8)
    ax.set_ylim(0, top * 1.03)
    ax.set_xlim(-0.7, len(sizes[0]) - 0.3)
    parts = 4 if top > 64 else 3 if top % 3 == 0 else 2 if top % 2 == 0 else 1
    ax.set_yticks([round(top * i / parts) for i in range(parts + 1)])
    ax.tick_params(axis="x", length=0)


def _bars(ax: "Axes", bottoms: Sequence[int], tops: Sequence[int], **style: Any) -> None:
    """Draw all bars as one path: for 20 phases of 32 layers, ten times smaller than a shape a bar."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    paths = [
        Path([(i - 0.4, low), (i + 0.4, low), (i + 0.4, high), (i - 0.4, high), (i - 0.4, low)], closed=True)
        for i, (low, high) in enumerate(zip(bottoms, tops, strict=True))
        if high > low
    ]
    if paths:
        ax.add_patch(PathPatch(Path.make_compound_path(*paths), **style))


def _phase_key(figure: "Figure", axes: "list[Axes]", records: Sequence[PhaseRecord]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    phases = len(records) - 1
    colours = _phase_colours(phases)
    handles = [Patch(color=KEPT, label="kept")]
    if phases <= _FEW_PHASES:
        for before, after, colour in zip(records, records[1:], colours, strict=False):
            when = "in" if after.phase == before.phase + 1 else "up to"
            handles.append(Patch(color=colour, label=f"removed {when} phase {after.phase}"))
    handles.append(Patch(facecolor="none", edgecolor=DENSE, label="dense"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0.2)
    if phases > _FEW_PHASES:
        norm = BoundaryNorm([i + 0.5 for i in range(phases + 1)], phases)
        scale = ScalarMappable(norm, ListedColormap(colours))
        bar = figure.colorbar(scale, ax=axes, pad=0.01, aspect=40, label="removed in phase")
        bar.set_ticks(sparse(range(1, phases + 1), 10))
        bar.ax.minorticks_off()
        bar.ax.invert_yaxis()


def _phase_colours(phases: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps["YlOrBr"](0.2 + 0.5 * (i + 0.5) / phases) for i in range(phases)]


@styled()
def layers_figure(record: RunRecord) -> "Figure":
    """Draw importance and cumulative sparsity of every layer (columns) by phase (rows) as two heat maps."""
    phases = [phase for phase in record.phases if phase.importance and phase.sparsity]
    shares = [[100 * x for x in phase.sparsity] for phase in phases]
    top = max(5.0, *(x for row in shares for x in row))
    row_height = 0.4 if len(phases) <= _FEW_PHASES else 0.16
    figure = new_figure(1.5 + 2 * max(0.45, row_height * len(phases)))
    above, below = figure.subplots(2, 1, sharex=True)
    _heat_map(above, [phase.importance for phase in phases], phases, "PuOr", (-1, 1), "{:.1f}")
    _heat_map(below, shares, phases, "Oranges", (0, top), "{:.0f}")
    above.set_title("importance")
    below.set_title("sparsity, % of the dense width")
    layer_axis(below, len(shares[0]))
    return figure


def _heat_map(
    ax: "Axes",
    rows: Sequence[Sequence[float]],
    phases: Sequence[PhaseRecord],
    colours: str,
    limits: tuple[float, float],
    text: str,
) -> None:
    import numpy as np

    mesh = ax.pcolormesh(
        rows, cmap=colours, vmin=limits[0], vmax=limits[1], edgecolors="white", linewidth=0.6
    )
    ax.set_xticks([])
    names = [phase.phase for phase in phases]
    ticks = sparse(range(len(names)), 10)
    ax.set_yticks([i + 0.5 for i in ticks], [str(names[i]) for i in ticks])
    ax.set_ylabel("phase")
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(mesh, ax=ax, pad=0.01, aspect=12).outline.set_visible(False)
    if len(rows) <= _FEW_PHASES and len(rows[0]) <= _MANY_LAYERS:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                red, green, blue, _ = mesh.to_rgba(np.array([value]))[0]
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
                cell: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5}
                shown = text.format(value).replace("-0.0", "0.0")
                ax.text(x + 0.5, y + 0.5, shown, color="white" if dark else INK, **cell)


@styled()
def sensitivity_figure(increases: Sequence[float], importance: Sequence[float]) -> "Figure":
    """Draw how much the loss grows (nats a token) if one layer alone is pruned, above its importance."""
    figure = new_figure(4.6)
    axes = figure.subplots(2, 1, sharex=True)
    rows = ((increases, GONE, "loss increase, nats a token"), (importance, KEPT, "importance"))
    for ax, (values, colour, title) in zip(axes, rows, strict=True):
        ax.bar(range(len(values)), values, color=colour)
        middle, top = sorted(values)[len(values) // 2], max(values)
        if top > 10 * middle > 0:  # one very tall bar would hide the differences of the others
            linear = 10.0 ** math.ceil(math.log10(middle))
            ax.set_yscale("symlog", linthresh=linear)
            ax.set_yticks([0, linear / 2, *(linear * 10**k for k in range(9) if linear * 10**k <= top)])
            ax.yaxis.set_major_formatter("{x:g}")
            title += f" (logarithmic above {linear:g})"
        ax.set_title(title)
        ax.grid(True, axis="y")
        ax.set_axisbelow(True)
    layer_axis(axes[1], len(importance))
    return figure


@styled()
def quality_figure(record: RunRecord) -> "Figure | None":
    """Draw perplexity and accuracy of every phase against its parameters; None if neither was measured."""
    draw = [_draw_perplexity] * any(phase.perplexity is not None for phase in record.phases)
    draw += [_draw_accuracy] * any(accuracies(phase) for phase in record.phases)
    if not draw:
        return None
    figure = new_figure(3.6)
    for ax, panel in zip(figure.subplots(1, len(draw), squeeze=False)[0], draw, strict=True):
        panel(ax, record)
        size_axis(ax)
    return figure


def _draw_perplexity(ax: "Axes", record: RunRecord) -> None:
    both = [
        (phase.params, phase.perplexity_pruned if record.trained else None, phase.perplexity)
        for phase in record.phases
    ]
    pruned = [(params, value) for params, value, _ in both if value is not None and math.isfinite(value)]
    ended = [(params, value) for params, _, value in both if value is not None and math.isfinite(value)]
    # In a phase of one size the pruned value comes first.
    path = sorted([*pruned, *ended], key=lambda point: -point[0])
    if not path:
        return
    ax.plot(*zip(*path, strict=True), color="#b5b5b5", linewidth=1, zorder=1)
    if pruned:
        ax.plot(*zip(*pruned, strict=True), "^", color=GONE, label="pruned, before recovery")
    ax.plot(*zip(*ended, strict=True), "o", color=KEPT, label="after recovery" if pruned else "pruned")
    if record.phases[0].perplexity is not None:
        ax.plot(*ended[0], "s", color=DENSE, markersize=7, label="dense")
    few = len(record.phases) - 1 <= _FEW_PHASES
    for points, offset in ((pruned, 8), (ended, -14)):
        for i, (params, value) in enumerate(points):
            if few or i == len(points) - 1 or (points is ended and i == 0):
                place: dict[str, Any] = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center"}
                ax.annotate(perplexity_text(value), (params, value), **place)
    values = [value for _, value in path]
    if max(values) > 4 * min(values):
        log_scale(ax)
    ax.margins(y=0.18)
    ax.set_title("perplexity (lower is better)")
    ax.legend(loc="upper left")


def _draw_accuracy(ax: "Axes", record: RunRecord) -> None:
    """Draw a line a task, or the mean alone where there are more tasks than colours."""
    measured = [(phase.params, accuracies(phase)) for phase in record.phases]
    measured = [(params, values) for params, values in measured if values]
    tasks = list(measured[0][1])
    if len(tasks) > len(COLOURS):
        means = [100 * sum(values.values()) / len(values) for _, values in measured]
        ax.plot([params for params, _ in measured], means, "o-", color=KEPT)
        ax.set_title(f"mean accuracy of {len(tasks)} benchmarks, % (higher is better)")
    else:
        for task, colour, marker in zip(tasks, COLOURS, MARKERS, strict=False):
            line = [(params, 100 * values[task]) for params, values in measured if task in values]
            ax.plot(*zip(*line, strict=True), marker=marker, color=colour, label=task.replace("$", r"\$"))
        ax.set_title("accuracy, % (higher is better)")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


@styled()
def training_figure(record: RunRecord) -> "Figure | None":
    """Draw losses and learning rate against the global step; None if nothing was trained."""
    points = [point for phase in record.phases for point in phase.losses]
    if not points:
        return None
    figure = new_figure(3.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    window = max(5, len(points) // 50)
    many = len(points) >= 8 * window
    for phase in record.phases:
        steps = [step for step, _, _ in phase.losses]
        losses = [loss for _, loss, _ in phase.losses]
        if many:
            above.plot(steps, losses, color="#8fb8d3", linewidth=0.8, label="each step")
            parts = [losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses))]
            means = [sum(part) / len(part) for part in parts]
            above.plot(steps, means, color=KEPT, linewidth=1.8, label=f"mean of {window} steps")
        else:
            above.plot(steps, losses, "o-", color=KEPT, markersize=3, label="trained on")
        if phase.held_out:
            above.plot(*zip(*phase.held_out, strict=True), "s--", color=GONE, markersize=3, label="held out")
    kinds = {line.get_label(): line for line in above.get_lines()}
    if len(kinds) > 1:
        figure.legend(handles=list(kinds.values()), loc="outside upper right", ncols=len(kinds))
    steps = [step for step, _, _ in points]
    below.plot(steps, [rate for _, _, rate in points], color=RATE)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.set_ylim(bottom=0)
    above.set_ylabel("loss" if "held out" in kinds else "training loss")
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step, over all phases")
    _mark_phases((above, below), [p for p in record.phases if p.losses], steps[-1] - steps[0])
    return figure


def _mark_phases(axes: "Sequence[Axes]", phases: Sequence[PhaseRecord], span: int) -> None:
    """Draw a line where a phase begins, with its number if there is room."""
    last = -math.inf
    for phase in phases:
        start = phase.losses[0][0]
        for ax in axes:
            ax.axvline(start, color="#c9c9c9", linewidth=0.8, zorder=0)
        if start - last >= 0.03 * span:
            text = f"phase {phase.phase}" if len(phases) <= _FEW_PHASES else str(phase.phase)
            axes[0].text(start, 1.02, text, transform=axes[0].get_xaxis_transform(), color=DENSE, fontsize=8)
            last = start
