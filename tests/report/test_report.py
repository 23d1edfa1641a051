"""The report of a run and the page of a phase, from a record alone."""

import dataclasses
import io
import re
from collections import Counter
from xml.etree import ElementTree

import pytest
from rich.console import Console

from core.report import figures
from core.report.report import build_phase_report, build_report, phase_table
from core.runs.record import DistillationRecord, RunRecord
from tests.support.reports import Page, make_record


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


@pytest.mark.parametrize("trained", [True, False])
def test_a_teacher_is_named_where_it_taught(trained):
    record = make_record(trained=trained, settings={"training": {"teacher": "base"}})
    text = Page(build_report(record)).text
    assert ("60.0k training tokens, taught by the base model" in text) == trained
    assert ("taught by" in text) == trained
    assert "taught by" not in Page(build_report(make_record())).text


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


def test_the_terminal_table_fits_eighty_columns():
    record = make_record()
    tasks = [{task: m | {"chance": 0.25} for task, m in phase.tasks.items()} for phase in record.phases]
    phases = [dataclasses.replace(p, tasks=found) for p, found in zip(record.phases, tasks, strict=True)]
    console = Console(width=80, file=io.StringIO())
    console.print(phase_table(dataclasses.replace(record, phases=tuple(phases))))
    text = console.file.getvalue()
    assert "…" not in text
    assert "Accuracies in %; by chance: arc_easy 25, " in " ".join(text.split())
    lines = [line.split() for line in text.splitlines()]
    assert ["dense", "134,515,008", "-", "24.50", "45.1", "46.1", "61"] in lines
    assert ["2", "108,315,006", "97.00", "37.50", "41.1", "42.1", "90"] in lines


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
