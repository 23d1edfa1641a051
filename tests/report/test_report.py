import dataclasses
import io
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from rich.console import Console

from core.report import figures
from core.report.report import build_phase_report, build_report, phase_table
from core.runs.record import DistillationRecord, LayerSizes, PhaseRecord, RunRecord


def make_record(phases=2, layers=30, tasks=("arc_easy", "piqa"), trained=True, **changes):
    """A run whose layers shrink by a different amount each, with all numbers distinct."""
    steps, records = 0, []
    for phase in range(phases + 1):
        share = [phase / phases * (0.1 + 0.6 * i / layers) for i in range(layers)]
        sizes = tuple(
            LayerSizes(query_heads=9 - 3 * (s > 0.3), kv_heads=3 - (s > 0.3), mlp_width=round(1536 * (1 - s)))
            for s in share
        )
        length = 4 + 10 * phase
        losses = tuple((steps + k, 3 - 0.01 * k + 0.1 * (k % 3), 2e-5) for k in range(length))
        records.append(
            PhaseRecord(
                phase=phase,
                params=134_515_008 - phase * (26_200_002 // phases),
                target_params=134_515_008 - phase * (26_200_002 // phases) + phase,
                layers=sizes,
                importance=tuple(1 - 2 * i / (layers - 1) for i in range(layers)) if phase else (),
                sparsity=tuple(share) if phase else (),
                perplexity_pruned=24.5 + 36.25 * phase if phase else None,
                perplexity=24.5 + 6.5 * phase,
                tasks={
                    t: {
                        "acc,none": 0.2,
                        "acc_norm,none": 0.4512 - phase / 50 + i / 100,
                        "acc_norm_stderr,none": 0.0287,
                    }
                    for i, t in enumerate(tasks)
                },
                tokens=20_000 * phase if trained else 0,
                losses=losses if trained and phase else (),
                seconds={"calibrate": 14.5 * phase, "evaluate": 61.25},
            )
        )
        steps += length if phase else 0
    values = {
        "key": "3f9ac1d27be0",
        "name": "demo",
        "base": "org/SmolLM2-135M",
        "revision": "abcdef123",
        "settings": {
            "seed": 17,
            "prune": {"amplitude": 0.0375},
            "training": {"sources": [{"path": "text.txt"}]},
        },
        "phases": tuple(records),
        "checkpoint_uri": "/store/runs/3f9/phases/02/recovered",
        "tracking_uri": "sqlite:////out/mlflow.db",
        "tracking_run": "768a2911",
    }
    return RunRecord(**(values | changes))


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the visible text."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data if "svg" in self.open else f"{data} ")

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def html():
    return build_report(make_record())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_numbers_of_the_record_appear(page):
    record = make_record()
    for phase in record.phases:
        assert f"{phase.params:,}" in page.text
        assert f"{phase.perplexity:.2f}" in page.text
    for expected in (
        "134.5M → 108.3M",  # the headline
        "24.50 → 37.50",
        "2 below target",
        "19.5 % removed",
        "60.75",  # perplexity before recovery in phase 1
        "97.00",
        "41.1 ± 2.9",  # arc_easy after phase 2
        "42.1 ± 2.9",
        "acc_norm",
        "60.0k training tokens",
        "3 min 47 s",  # 3 evaluations and 1 + 2 calibrations
        "17",
        "0.0375",
        "sources[0].path",
        "text.txt",
        "adapt-pruner generate /store/runs/3f9/phases/02/recovered",
        "mlflow ui --backend-store-uri sqlite:////out/mlflow.db",
        "abcdef123",
        "768a2911",
    ):
        assert expected in page.text, expected


def test_the_pictures_are_there_and_are_well_formed(html):
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        assert "width" not in root.attrib or root.attrib["width"].endswith("pt")
    texts = [set(ElementTree.fromstring(picture).itertext()) for picture in pictures]
    assert {"MLP width", "query heads", "KV heads", "removed in phase 2", "decoder layer"} <= texts[0]
    assert {"importance", "sparsity, % of the dense width"} <= texts[1]
    assert {"perplexity (lower is better)", "pruned, before recovery", "arc_easy"} <= texts[2]
    assert {"training loss", "learning rate", "phase 2"} <= texts[3]


def test_the_loss_of_what_is_held_out_stands_beside_that_of_what_is_trained_on(page):
    record = make_record()
    assert "held out" not in page.text
    phases = [
        dataclasses.replace(phase, held_out=tuple((step, loss + 1) for step, loss, _ in phase.losses[::4]))
        for phase in record.phases
    ]
    record = dataclasses.replace(record, phases=tuple(phases))
    above = figures.training_figure(record).axes[0]
    drawn = [line.get_xydata().tolist() for line in above.get_lines() if line.get_label() == "held out"]
    assert drawn == [[list(point) for point in phase.held_out] for phase in phases if phase.held_out]
    assert "held out" in Page(build_report(record)).text


def test_the_page_loads_nothing_from_elsewhere(html, page):
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert not re.search(r"<!DOCTYPE(?! html>)", html)


def test_ids_are_unique_and_every_reference_has_its_target(html, page):
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert max(ids.values()) == 1
    references = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert references
    assert references <= set(ids)


def test_names_and_settings_are_escaped():
    evil = "<script>alert('x')</script>&\"$a_b$"
    record = make_record(
        tasks=(evil, "[red]q"),
        name=evil,
        base=f"org/{evil}",
        settings={evil: evil, "s": {evil: [evil]}},
        checkpoint_uri=f"/store/{evil}",
        tracking_run=evil,
    )
    record = dataclasses.replace(
        record, phases=tuple(dataclasses.replace(p, seconds={evil: 3.0}) for p in record.phases)
    )
    html = build_report(record)
    assert "<script" not in html
    page = Page(html)
    assert page.tags("script") == []
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert any(evil in set(ElementTree.fromstring(picture).itertext()) for picture in pictures)
    assert page.text.count("<script>alert('x')</script>&\"") >= 8  # shown as text
    console = Console(width=200, file=io.StringIO())
    console.print(phase_table(record))
    assert evil in console.file.getvalue()
    assert "[red]q" in console.file.getvalue()


def test_passwords_do_not_appear():
    record = make_record(
        tracking_uri="http://me:s3cret@mlflow:5000",
        checkpoint_uri="s3://key:s3cret@bucket/x",
        settings={"tracking": {"uri": "http://me:s3cret@mlflow:5000"}},
    )
    html = build_report(record)
    assert "s3cret" not in html
    assert "http://me:***@mlflow:5000" in html


def test_the_same_record_gives_the_same_page(html):
    assert build_report(RunRecord.from_dict(make_record().to_dict())) == html


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


def test_many_benchmarks_have_their_own_table_and_show_their_mean():
    tasks = tuple(f"task_{i}" for i in range(12))
    record = make_record(tasks=tasks)
    page = Page(build_report(record))
    assert "Benchmarks" in page.text
    assert "mean of 12 benchmarks" in page.text
    assert len([a for a in page.tags("table") if a.get("class") == "phases"]) == 2
    (line,) = figures.quality_figure(record).axes[1].lines
    expected = 100 * sum(0.4512 + i / 100 for i in range(12)) / 12
    assert line.get_ydata()[0] == pytest.approx(expected)


def test_a_run_without_training_has_no_recovery():
    record = make_record(phases=1, trained=False)
    page = Page(build_report(record))
    assert "recover" not in page.text.replace(record.checkpoint_uri, "").lower()
    assert "no training" in page.text
    assert len(page.tags("svg")) == 3
    assert figures.training_figure(record) is None


def test_what_repair_and_distillation_cost_and_brought_has_a_table():
    record = make_record(trained=False)
    assert "Repair" not in Page(build_report(record)).text
    dense, first, second = record.phases
    repaired = dataclasses.replace(first, repair_s=71.0)
    page = Page(build_report(dataclasses.replace(record, phases=(dense, repaired, second))))
    assert "Repair What was done" in page.text
    assert "1 min 11 s" in page.text
    assert "istill" not in page.text
    distilled = dataclasses.replace(
        second, distillation=DistillationRecord(seconds=245.0, tokens=98_304, before=0.7512, after=0.5218)
    )
    page = Page(build_report(dataclasses.replace(record, phases=(dense, repaired, distilled))))
    for expected in ("Repair and distillation", "1 min 11 s", "4 min 05 s", "0.751", "0.522", "98.3k"):
        assert expected in page.text, expected
    assert "2 phases, no training, 98.3k tokens of distillation" in page.text


def test_what_was_not_measured_is_left_out():
    dense = make_record(tasks=()).phases[0]
    dense = dataclasses.replace(dense, perplexity=None, seconds={})
    bare = make_record(phases=2, settings={}, checkpoint_uri="", tracking_uri="", tracking_run="")
    page = Page(build_report(dataclasses.replace(bare, phases=(dense,))))
    assert "not pruned yet" in page.text
    assert page.tags("svg") == []
    for absent in ("Perplexity", "Accuracy", "MLflow", "Use the result"):
        assert absent not in page.text
    assert "demo" in Page(build_report(dataclasses.replace(bare, phases=()))).text


def test_a_diverged_phase_does_not_break_the_pictures():
    record = make_record()
    phases = (*record.phases[:2], dataclasses.replace(record.phases[2], perplexity_pruned=float("inf")))
    page = Page(build_report(dataclasses.replace(record, phases=phases)))
    assert "infinite" in page.text


def test_a_long_run_stays_small():
    html = build_report(make_record(phases=20, layers=32))
    assert len(html) < 1_000_000
    Page(html)


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


def test_the_terminal_table_fits_eighty_columns():
    record = make_record()
    console = Console(width=80, file=io.StringIO())
    console.print(phase_table(record))
    text = console.file.getvalue()
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["dense", "134,515,008", "-", "24.50", "45.1", "46.1", "61"] in lines
    assert ["2", "108,315,006", "97.00", "37.50", "41.1", "42.1", "90"] in lines


def test_the_sensitivity_picture_shows_every_layer_though_one_towers_above_the_others():
    increases, importance = [0.8, 3.0, 0.04, 0.02, 0.05, -0.01], [0.3, 0.2, 0.1, 0.2, 0.3, 0.2]
    above, below = figures.sensitivity_figure(increases, importance).axes
    assert [bar.get_height() for bar in above.patches] == increases
    assert [bar.get_height() for bar in below.patches] == importance
    assert (above.get_yscale(), below.get_yscale()) == ("symlog", "linear")
    assert above.get_title(loc="left").endswith("(logarithmic above 0.1)")


# --- one phase


def phase_page(*phases, **changes):
    record = make_record(phases=3, **changes)
    return build_phase_report(dataclasses.replace(record, phases=tuple(record.phases[i] for i in phases)))


def test_a_phases_page_shows_it_beside_the_dense_model_and_the_phase_before():
    page = Page(phase_page(0, 2, 3))
    assert "demo, phase 3" in page.text
    for expected in (
        "134.5M → 108.3M",
        "24.50 → 44.00",
        "removed up to phase 2",
        "removed in phase 3",
        "492",
    ):
        assert expected in page.text, expected
    assert "60.0k training tokens" in page.text
    assert "1 min 45 s" in page.text, "its own time alone"
    assert len(page.tags("svg")) == 2
    assert page.text.count("phase 2") == 1, "in the picture of the widths, not in that of the training"
    assert "44 s" in page.text
    assert "3 min 04 s" not in page.text, "what all evaluations together took"
    first = Page(phase_page(0, 1))
    assert "removed in phase 1" in first.text
    assert "up to" not in first.text


def test_the_dense_model_and_a_phase_without_training_have_a_page_too():
    dense = Page(phase_page(0))
    assert "demo, dense model" in dense.text
    assert "not pruned yet" in dense.text
    assert "removed in phase" not in dense.text
    assert len(dense.tags("svg")) == len(Page(phase_page(0, 2, 3, trained=False)).tags("svg")) == 1


@pytest.mark.parametrize("phases", [(0,), (0, 1), (0, 2, 3)])
def test_a_phases_page_loads_nothing_and_is_the_same_each_time(phases):
    html = phase_page(*phases)
    assert html == phase_page(*phases)
    assert "://" not in re.sub(r"http://www.w3.org/\S+", "", html)
    assert not [tag for tag, _ in Page(html).elements if tag in ("script", "link", "img", "iframe")]
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert len(html) < 400_000
