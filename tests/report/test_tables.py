"""Tables of results: what a cell says, and where what was published stands."""

import math
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from core.evaluation.significance import Difference
from core.report.drawing import inline_svg
from core.report.tables import Picture, ResultTable, Row, published_value, value_text


def table(*rows, **more):
    return ResultTable(title="t", labels=("method",), metrics=("perplexity", "arc_easy"), rows=rows, **more)


@pytest.mark.parametrize(
    ("metric", "values", "text"),
    [
        ("params", [107_991_360.0, 107_991_360.0], "108.0M"),
        ("perplexity", [20.0, 22.0], "21.00 ± 1.41"),
        ("perplexity", [120.0, 122.0], "121 ± 1"),
        ("wikitext", [20.0], "20.00"),
        ("arc_easy", [0.5, 0.52], "51.0 ± 1.4"),
        ("seconds", [61.0], "1 min 01 s"),
        ("gpu_seconds", [7261.4], "7,261"),
        ("loss_increase", [0.0441, -0.0013], "0.0214 ± 0.0321"),
        ("perplexity", [20.0, math.inf], "infinite"),
        ("perplexity", [], "-"),
    ],
)
def test_a_cell_is_mean_and_standard_deviation_in_the_unit_of_its_metric(metric, values, text):
    assert value_text(metric, values, plain=metric != "arc_easy") == text


def test_published_figures_are_read_as_papers_print_them():
    assert published_value("params", "6.66B") == 6_660_000_000
    assert published_value("mmlu", "25.35") == 25.35
    assert published_value("wikitext", "12.5") == 12.5
    with pytest.raises(ValueError, match="could not convert"):
        published_value("mmlu", "a quarter")


def test_a_column_of_published_figures_stands_beside_the_metric_that_has_some():
    found = table(Row(labels={"method": "a"}, published={"arc_easy": 25.0}), Row(labels={"method": "b"}))
    assert found.columns() == {
        "method": ["a", "b"],
        "perplexity": ["-", "-"],
        "arc_easy, %": ["-", "-"],
        "arc_easy, %, published": ["25.0", "-"],
    }


def test_a_task_that_measures_no_share_is_not_shown_in_percent():
    rows = [
        Row(labels={"method": "a"}, measured={"pile_10k": [25.3], "piqa": [0.5]}),
        Row(labels={"method": "b"}, published={"pile_10k": 12.5, "piqa": 70.0}),
    ]
    found = ResultTable(title="t", labels=("method",), metrics=("pile_10k", "piqa"), rows=tuple(rows))
    assert found.columns() == {
        "method": ["a", "b"],
        "pile_10k": ["25.30", "-"],
        "pile_10k, published": ["-", "12.50"],
        "piqa, %": ["50.0", "-"],
        "piqa, %, published": ["-", "70.0"],
    }
    published = [row["metrics"]["piqa"]["published"] for row in found.to_dict()["rows"]]
    assert published == [None, 0.7]


def test_the_loss_of_a_layer_is_in_nats_not_in_percent():
    row = Row(labels={"layer": "0"}, measured={"loss_increase": [0.9812]})
    found = ResultTable(title="t", labels=("layer",), metrics=("loss_increase",), rows=(row,))
    assert found.columns() == {"layer": ["0"], "loss increase, nats a token": ["0.9812"]}


def test_labels_cannot_break_out_of_markdown_or_html():
    label = "a|b\n<script>alert(1)</script>$"
    row = Row(labels={"method": label}, measured={"perplexity": [2.0]})
    found = table(row, picture=Picture(x="method", y="perplexity"), notes=(label,))
    lines = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert "\\|" in lines[2]
    assert "<script>" not in found.markdown() + found.html()


@pytest.mark.parametrize(
    ("labels", "joined", "places"),
    [
        (["1", "2", "8"], True, [1.0, 2.0, 8.0]),
        (["0.005", "0.04"], True, [0.005, 0.04]),
        (["20 %", "40 %"], True, [0.0, 1.0]),
        (["4.57.1", "5.0"], True, [0.0, 1.0]),
        (["Adapt-Accel", "Minitron"], False, [0.0, 1.0]),
    ],
)
def test_the_base_model_is_a_level_and_no_point_of_a_line(labels, joined, places, monkeypatch):
    drawn = []
    monkeypatch.setattr("core.report.tables.inline_svg", lambda figure, **_: drawn.append(figure) or "")
    dense = Row(labels={"method": "dense"}, measured={"perplexity": [20.0, 21.0]})
    rows = [
        Row(labels={"method": label}, measured={"perplexity": [30.0 + place]})
        for place, label in enumerate(labels)
    ]
    table(dense, *rows, picture=Picture(x="method", y="perplexity")).html()
    assert ">dense<" in inline_svg(drawn[0], name="rows", label="rows")
    FigureCanvasAgg(drawn[0]).draw()
    (ax,) = drawn[0].axes
    assert ax.texts[0].get_window_extent().x1 == pytest.approx(ax.get_window_extent().x1, abs=2)
    points, level = drawn[0].axes[0].get_lines()[0], drawn[0].axes[0].get_lines()[-1]
    assert points.get_xdata().tolist() == places
    assert points.get_ydata().tolist() == [30.0 + place for place, _ in enumerate(labels)]
    assert (points.get_linestyle() == "-") == joined
    assert set(level.get_ydata()) == {20.5}
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["dense"]


def test_a_picture_is_a_file_too_as_long_as_there_is_something_to_show(tmp_path):
    row = Row(labels={"method": "a"}, measured={"perplexity": [2.0]})
    shown = table(row, picture=Picture(x="method", y="perplexity"))
    files = ["table.md", "table.csv", "table.json", "table.html", "table.svg"]
    assert shown.write(tmp_path) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    picture = (tmp_path / "table.svg").read_text()
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert picture in (tmp_path / "table.html").read_text()
    assert table(row).write(tmp_path) == files[:-1]
    assert not (tmp_path / "table.svg").exists()


def test_nothing_that_is_not_finite_goes_into_json_or_the_picture():
    row = Row(labels={"method": "a"}, measured={"perplexity": [math.inf, 2.0]}, repetitions=(2, 2))
    found = table(row, picture=Picture(x="method", y="perplexity"))
    metric = found.to_dict()["rows"][0]["metrics"]["perplexity"]
    assert metric == {"mean": None, "spread": None, "values": [None, 2.0], "published": None}
    assert "<svg" not in found.html()
    worse = Difference(value=math.inf, low=2.0, high=math.inf, items=12, left_out=0, verdict="worse")
    row = Row(
        labels={"method": "a"},
        measured={"perplexity": [math.inf]},
        intervals={"perplexity": (40.0, math.inf)},
        differences={"perplexity": worse},
    )
    found = table(row).to_dict()["rows"][0]["metrics"]["perplexity"]
    assert (found["mean"], found["low"], found["high"]) == (None, 40.0, None)
    assert (found["difference"], found["difference_low"], found["difference_high"]) == (None, 2.0, None)
