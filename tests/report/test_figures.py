"""The pictures of a report show the numbers of the record."""

import dataclasses
from itertools import combinations, pairwise

import pytest

from core.report import figures
from core.report.drawing import new_figure, size_axis
from tests.support.reports import make_record


def bar_tops(patch, layers):
    """Read the top of each layer's bar off a drawn path; a layer without a bar has none."""
    tops = [None] * layers
    for x, y in patch.get_path().vertices:
        i = round(x)
        tops[i] = max(y, tops[i] or 0)
    return tops


def test_the_bars_show_the_widths_of_each_phase():
    record = make_record(phases=3)
    mlp, query, kv = figures.widths_figure(record).axes[:3]
    for ax, field in ((mlp, "mlp_width"), (query, "query_heads"), (kv, "kv_heads")):
        wanted = [[getattr(sizes, field) for sizes in phase.layers] for phase in record.phases]
        kept, *rest, outline = [bar_tops(patch, 30) for patch in ax.patches]
        assert kept == wanted[3]
        assert outline == wanted[0]
        rest = iter(rest)
        for before, after in pairwise(wanted):
            # The part that a phase took ends where the phase before it had left the layer.
            expected = [b if b > a else None for b, a in zip(before, after, strict=True)]
            if any(expected):
                assert next(rest) == expected


def test_equal_heads_share_one_panel():
    record = make_record()
    phases = tuple(
        dataclasses.replace(p, layers=tuple(dataclasses.replace(s, kv_heads=s.query_heads) for s in p.layers))
        for p in record.phases
    )
    axes = figures.widths_figure(dataclasses.replace(record, phases=phases)).axes
    assert [ax.get_ylabel() for ax in axes] == ["MLP width", "heads"]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (8 * 10**9, "8B"),
        (10**9, "1B"),
        (1_050_000_000, "1.05B"),
        (10 * 10**9, "10B"),
        (134_515_008, "134.5M"),
        (120_000_000, "120M"),
        (500, "500"),
    ],
)
def test_the_axis_of_sizes_says_how_many_parameters(params, text):
    ax = new_figure(3.0).subplots()
    size_axis(ax)
    assert ax.xaxis.get_major_formatter()(params, 0) == text


def test_the_heat_maps_show_importance_and_percent_of_sparsity():
    record = make_record(phases=3)
    importance, sparsity = (ax.collections[0].get_array() for ax in figures.layers_figure(record).axes[:2])
    assert importance.tolist() == [list(phase.importance) for phase in record.phases[1:]]
    assert sparsity.tolist() == [[100 * x for x in phase.sparsity] for phase in record.phases[1:]]


def test_the_quality_picture_shows_each_phase_pruned_and_recovered():
    record = make_record(phases=3)
    perplexity, accuracy = figures.quality_figure(record).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in perplexity.lines}
    assert lines["pruned, before recovery"] == [[p.params, p.perplexity_pruned] for p in record.phases[1:]]
    assert lines["after recovery"] == [[p.params, p.perplexity] for p in record.phases]
    lines = {line.get_label(): line.get_ydata().tolist() for line in accuracy.lines}
    assert lines["piqa"] == [100 * p.tasks["piqa"]["acc_norm,none"] for p in record.phases]


@pytest.mark.parametrize(("phases", "layers"), [(1, 16), (2, 30), (5, 24), (20, 32), (3, 80)])
def test_labels_do_not_overlap(phases, layers, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    boxes = []
    draw_text = Text.draw

    def draw_and_remember(text, renderer):
        if text.get_text() and text.get_visible():
            boxes.append((text.get_text(), text.get_window_extent(renderer)))
        draw_text(text, renderer)

    record = make_record(phases=phases, layers=layers, tasks=("arc_easy", "openbookqa", "piqa"))
    for draw in (
        figures.widths_figure,
        figures.layers_figure,
        figures.quality_figure,
        figures.training_figure,
    ):
        canvas = FigureCanvasAgg(draw(record))
        canvas.draw()  # lays out
        monkeypatch.setattr(Text, "draw", draw_and_remember)
        canvas.draw()
        monkeypatch.undo()
        assert len(boxes) > 10
        for (first, a), (second, b) in combinations(boxes, 2):
            assert not a.overlaps(b), (draw.__name__, first, second)
        boxes.clear()


def test_the_sensitivity_picture_shows_every_layer_though_one_towers_above_the_others():
    increases, importance = [0.8, 3.0, 0.04, 0.02, 0.05, -0.01], [0.3, 0.2, 0.1, 0.2, 0.3, 0.2]
    above, below = figures.sensitivity_figure(increases, importance).axes
    assert [bar.get_height() for bar in above.patches] == increases
    assert [bar.get_height() for bar in below.patches] == importance
    assert (above.get_yscale(), below.get_yscale()) == ("symlog", "linear")
    assert above.get_title(loc="left").endswith("(logarithmic above 0.1)")
