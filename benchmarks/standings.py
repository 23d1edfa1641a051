"""Rows of measured models beside each other: their table, their figures, their picture."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from core.report.drawing import DENSE, GONE, INK, KEPT, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "method=adapt-pruner"
"""The row of our default, which has no setting of its own."""

Measured = dict[str, Any]
"""What was measured of a row with one seed."""


def grouped(rows: Sequence[Measured]) -> dict[float, dict[str, list[Measured]]]:
    """Return the measured rows of all seeds, by share removed and settings; the dense model has 0 removed."""
    groups: dict[float, dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["removed"]][row["row"]].append(row)
    return groups


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean over seeds, the standard deviation (None for one seed), and the number of seeds."""
    spread = round(stdev(values), 3) if len(values) > 1 else None
    return {"mean": round(fmean(values), 3), "spread": spread, "seeds": len(values)}


def shown(values: Sequence[float], digits: int) -> str:
    """Return a mean, and the standard deviation where there is one."""
    spread = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):,.{digits}f}{spread}"


def perplexities(rows: Sequence[Measured], text: str) -> list[float]:
    """Return what the rows measured on a text."""
    return [row["perplexity"][text] for row in rows]


def accuracies(rows: Sequence[Measured]) -> list[float]:
    """Return the mean accuracy over the tasks, of each row."""
    return [fmean(row["accuracy"].values()) for row in rows if row["accuracy"]]


def table(rows: Sequence[Measured], texts: Sequence[str]) -> Table:
    """Return the rows, best first on the first text."""
    result = Table("removed", "settings", "seeds", *texts, "accuracy", "s", "GB")
    for removed, groups in sorted(grouped(rows).items()):
        for name in ranked(groups, texts[0]):
            here = groups[name]
            figures = [shown(perplexities(here, text), 1) for text in texts]
            right = accuracies(here)
            result.add_row(
                f"{removed:.0%}",
                name or "dense",
                str(len(here)),
                *figures,
                shown(right, 3) if right else "-",
                f"{fmean(row['seconds'] for row in here):.0f}",
                f"{max(row['peak_gb'] for row in here):.1f}",
            )
    return result


def ranked(groups: dict[str, list[Measured]], text: str) -> list[str]:
    """Return the settings of a size, those with the lowest mean perplexity on a text first."""
    return sorted(groups, key=lambda name: fmean(perplexities(groups[name], text)))


def figures(rows: Sequence[Measured]) -> dict[str, object]:
    """Return the dense model's figures, and those of each size, whose names end with the share removed."""
    groups = grouped(rows)
    (of_dense,) = groups.pop(0.0).values()
    dense = of_dense[0]["perplexity"]
    found: dict[str, object] = {"dense_ppl": dense, "dense_acc": of_dense[0]["accuracy"]}
    for removed, here in sorted(groups.items()):
        found |= {f"{name}_{removed * 100:.0f}": value for name, value in of_size(here, dense).items()}
    return found


def of_size(here: dict[str, list[Measured]], dense: dict[str, float]) -> dict[str, object]:
    """Return the figures of one size."""
    most = max(map(len, here.values()))
    by_text = {text: ranked(here, text) for text in dense}
    best = {text: rows[0] for text, rows in by_text.items()}
    found: dict[str, object] = {
        "incomplete": {row: len(rows) for row, rows in here.items() if len(rows) < most},
        "best": best,
        "best_ppl": {text: summary(perplexities(here[row], text)) for text, row in best.items()},
        "seconds": {row: round(fmean(one["seconds"] for one in rows), 1) for row, rows in here.items()},
        "peak_gb": {row: max(one["peak_gb"] for one in rows) for row, rows in here.items()},
    }
    right = {row: accuracies(rows) for row, rows in here.items() if accuracies(rows)}
    if right:
        found["best_acc_of"] = first = max(right, key=lambda row: fmean(right[row]))
        found["best_acc"] = summary(right[first])
        found["acc"] = {row: summary(values) for row, values in right.items()}
    peers = {text: [row for row in rows if is_peer(here[row])] for text, rows in by_text.items()}
    if all(peers.values()):
        found["best_peer"] = {text: rows[0] for text, rows in peers.items()}
        ratios = {
            row: {text: risen(rows, here[peers[text][0]], text, dense) for text in dense}
            for row, rows in here.items()
            if not is_peer(rows)
        }
        found["rise_ratios"] = ratios
        if OURS in here:
            found["rise_ratio"] = ratios[OURS]
    return found


def is_peer(rows: Sequence[Measured]) -> bool:
    """Return whether rows are a compared method's: settings hold what is not as by default."""
    return "method" in rows[0]["settings"]


def risen(
    rows: Sequence[Measured], others: Sequence[Measured], text: str, dense: dict[str, float]
) -> dict[str, float | int | None] | None:
    """Return the rise of perplexity over the dense model as a share of that of other rows, seed by seed.

    None if they share no seed.
    """
    beside = {row["seed"]: row["perplexity"][text] - dense[text] for row in others}
    shared = [row for row in rows if row["seed"] in beside]
    ratios = [(row["perplexity"][text] - dense[text]) / beside[row["seed"]] for row in shared]
    return summary(ratios) if ratios else None


class _Panel(NamedTuple):
    """A measure of rows, and how many decimals of it are shown."""

    title: str
    digits: int
    measure: Callable[[Sequence[Measured]], list[float]]


@styled()
def picture(rows: Sequence[Measured], texts: Sequence[str]) -> "Figure":
    """Draw a dot for each seed and a stroke for each mean, best first; a dashed line for the dense model."""
    groups = grouped(rows)
    (of_dense,) = groups.pop(0.0).values()
    sizes = sorted(groups.items())
    panels = [_Panel(f"perplexity on {text}", 1, partial(perplexities, text=text)) for text in texts]
    if any(accuracies(of) for _, here in sizes for of in here.values()):
        panels.append(_Panel("mean accuracy", 3, accuracies))
    names = {removed: [_name(row) for row in ranked(here, texts[0])] for removed, here in sizes}
    most = {removed: max(name.count("\n") for name in of) for removed, of in names.items()}
    heights = [(0.4 + 0.1 * most[removed]) * len(here) + 0.5 for removed, here in sizes]
    figure = new_figure(0.5 + sum(heights))
    axes = figure.subplots(len(sizes), len(panels), squeeze=False, sharey="row", height_ratios=heights)
    for (removed, here), line in zip(sizes, axes, strict=True):
        for panel, ax in zip(panels, line, strict=True):
            ordered = [here[row] for row in ranked(here, texts[0])]
            _dots(ax, [(panel.measure(of), is_peer(of)) for of in ordered], panel.digits)
            for level in panel.measure(of_dense):
                ax.axvline(level, color=DENSE, linestyle="--", linewidth=1)
            ax.set_title(panel.title)
        line[0].set_yticks(range(len(here)), names[removed], fontsize=8)
        line[0].set_ylabel(f"{removed:.0%} removed")
        line[0].invert_yaxis()
    _key(figure)
    return figure


def _name(row: str) -> str:
    """Return what a row is called: ours by its settings, a compared method by its name first."""
    settings = row.removeprefix(OURS).strip(",") or "our default"
    return textwrap.fill(settings.removeprefix("method=").replace(",", ", "), 44)


def _dots(ax: "Axes", rows: Sequence[tuple[list[float], bool]], digits: int) -> None:
    """Draw the values of each row, from the top; what is infinite has no place."""
    for place, (values, peer) in enumerate(rows):
        finite = list(filter(math.isfinite, values))
        if not finite:
            continue
        colour, mean = GONE if peer else KEPT, fmean(finite)
        ax.plot(finite, [place] * len(finite), "s" if peer else "o", color=colour, markersize=4, alpha=0.6)
        ax.vlines(mean, place - 0.2, place + 0.2, color=colour, linewidth=2)
        note: dict[str, Any] = {"xytext": (0, 10), "textcoords": "offset points", "ha": "center"}
        ax.annotate(shown(finite, digits), (mean, place), fontsize=7.5, color=INK, **note)
    ax.set_ylim(-0.7, len(rows) - 0.4)
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)
    ax.margins(x=0.18)
    ax.tick_params(axis="y", length=0)


def _key(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=KEPT, marker="o", linestyle="", label="ours, each seed"),
        Line2D([], [], color=GONE, marker="s", linestyle="", label="compared, each seed"),
        Line2D([], [], color=INK, marker="|", markersize=10, markeredgewidth=2, linestyle="", label="mean"),
        Line2D([], [], color=DENSE, linestyle="--", label="dense"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0.2)
