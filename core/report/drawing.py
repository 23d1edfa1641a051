"""What all figures share: colours, style, size, axes, and how they become part of a page.

Blue is what stays, orange what goes; they differ in lightness too, for colour-blind readers and grey prints.
Importing matplotlib takes half a second, so only the first figure does it.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core.quantities import count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, GONE, DENSE, RATE, INK = "#0b4f7d", "#d55e00", "#767676", "#7b3294", "#333333"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b6b6b", "#000000")
MARKERS = "osD^vPX*"
_FONTS = "'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_WIDTH = 10.6  # inches
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "adapt-pruner",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of the reports."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height: float) -> "Figure":
    """Return an empty figure as wide as the page, and ``height`` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def layer_axis(ax: "Axes", layers: int) -> None:
    """Number the decoder layers below bars or cells."""
    middle = 0.5 if ax.collections and ax.get_xlim()[0] == 0 else 0.0  # cells begin where bars are centred
    ticks = range(layers) if layers <= 40 else range(0, layers, 5)
    ax.set_xticks([i + middle for i in ticks], [str(i) for i in ticks])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("decoder layer")


def size_axis(ax: "Axes") -> None:
    """Put parameters on the x axis, the largest on the left."""
    ax.set_xlabel("parameters (the dense model is on the left)")
    ax.invert_xaxis()
    ax.margins(x=0.09)
    ax.xaxis.set_major_formatter(lambda value, _: _round_count(value))
    ax.grid(True)
    ax.set_axisbelow(True)


def _round_count(value: float) -> str:
    """Write a count without zeros at the end of its decimals: 8B, 1.05B, 134.5M, 135M."""
    return re.sub(r"\.?0+(?=[A-Za-z])", "", count_text(round(value))) if value >= 1000 else f"{value:.0f}"


def log_scale(ax: "Axes") -> None:
    """Make the y axis logarithmic, with plain numbers at it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def sparse(items: Sequence[int], most: int) -> list[int]:
    """Thin ``items`` to at most ``most``, at equal distances, with the last one."""
    return list(items[::-1][:: -(-len(items) // most)][::-1]) if items else []


@styled()
def inline_svg(figure: "Figure", *, name: str, label: str) -> str:
    """Return ``figure`` as an SVG element for HTML.

    ``name``, a short word, keeps its ids apart from those of other figures on the page; ``label`` is plain
    text for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", _FONTS, text)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
