"""Runs side by side: figures, intervals, the Pareto front, pictures and notes."""

import csv
import dataclasses
import io
import math

import pytest

from core.evaluation.significance import Difference
from core.quantities import seconds_text
from core.report.compared_figures import pareto_front, quality_against_size
from core.report.comparison import ComparedRun, _accuracies, _perplexities, comparison_page, comparison_table
from core.report.tables import figures_of
from core.runs.record import DistillationRecord
from tests.support.reports import Page, make_record


def compared(key="3f9ac1d27be0", name="demo", state="done", differences=(), **changes):
    record = make_record(key=key, name=name, **changes)
    place = f"s3://a/store/runs/{key}"
    return ComparedRun(
        place=place, key=key, name=name, state=state, record=record, differences=dict(differences)
    )


@pytest.fixture
def runs():
    gain = Difference(
        value=0.0123, low=-0.004, high=0.028, items=300, left_out=2, verdict="no difference shown"
    )
    ratio = Difference(value=1.05, low=1.02, high=1.08, items=64, left_out=0, verdict="worse")
    return [
        compared(),
        compared("a" * 12, differences={"arc_easy": gain, "perplexity": ratio}),
        compared("b" * 12, "other", phases=4, tasks=("arc_easy",)),
        compared("c" * 12, "bare", "interrupted, phase 0 of 3", tasks=(), phases=1),
        ComparedRun(
            place="", key="d" * 12, name="", state="damaged", record=None, notes=("run.json is damaged",)
        ),
    ]


def brute_front(points, lower_is_better):
    """What is kept if each model is compared with each other one."""

    def beats(a, b):
        good = a[1] <= b[1] if lower_is_better else a[1] >= b[1]
        return a[0] <= b[0] and good and a[:2] != b[:2]

    return {p[:2] for p in points if not any(beats(other, p) for other in points)}


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_front_is_what_no_other_model_beats(lower_is_better):
    points = [(size, float((7 * size) % 11), f"m{size}{i}") for size in range(1, 30) for i in range(2)]
    found = pareto_front(points, lower_is_better=lower_is_better)
    assert {point[:2] for point in found} == brute_front(points, lower_is_better)
    assert len(found) == len({point[:2] for point in found})


def test_the_picture_holds_each_phase_of_each_run_and_rings_the_front(runs):
    names = {run.place: run.name or "?" for run in runs}
    panels = [_perplexities(runs[2:4], names), _accuracies(runs[:3], names | {runs[1].place: "twin"})]
    figure = quality_against_size(panels)
    left, right = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    phases = runs[2].record.phases
    assert drawn["other"] == [[p.params, p.perplexity] for p in phases]
    ring = drawn["not beaten in size and quality (Pareto front)"]
    points = [(p.params, p.perplexity, "") for run in runs[2:4] for p in run.record.phases]
    assert {tuple(point) for point in ring} == brute_front(points, True)
    # arc_easy alone is common to all three.
    assert {line.get_label() for line in right.get_lines()} >= {"demo", "twin", "other"}
    assert "arc_easy" in right.get_title(loc="left")


def test_a_row_says_what_the_record_says_with_intervals_and_differences(runs):
    table = comparison_table(runs, against=runs[0])
    columns = table.columns()
    first = runs[0].record.phases[-1]
    assert columns["run"][:1] == ["dense"]
    at = columns["key"].index(runs[0].key)
    assert columns["run"][at : at + 5] == ["demo 3f9ac1", "demo aaaaaa", "other", "bare", "dddddd"]
    assert columns["parameters"][at] == "108.3M"
    assert columns["of dense"][at] == f"{100 * first.params / runs[0].record.phases[0].params:.1f} %"
    assert columns["perplexity"][at] == f"{first.perplexity:.2f}"
    low, high = (
        100 * (first.tasks["arc_easy"]["acc_norm,none"] + sign * 1.959964 * 0.0287) for sign in (-1, 1)
    )
    assert columns["arc_easy, %"][at].endswith(f"[{low:.1f}, {high:.1f}]")
    mean_error = 100 * 1.959964 * 0.0287 / math.sqrt(2)
    low, high = columns["mean accuracy, %"][at].split(" [")[1].rstrip("]").split(", ")
    assert float(high) - float(low) == pytest.approx(2 * mean_error, abs=0.11)
    against = "\nagainst demo 3f9ac1"
    assert columns[f"arc_easy, %{against}"][at + 1] == "+1.2 [-0.4, +2.8], no difference shown (2 left out)"
    assert columns[f"perplexity{against}"][at + 1] == "+5.0 % [+2.0, +8.0], worse"
    assert columns["parameters"][-1] == columns["perplexity"][-1] == "-"


def test_tokens_are_all_that_a_model_was_trained_on():
    record = make_record(phases=2)
    _, first, last = record.phases
    distilled = DistillationRecord(seconds=9.0, tokens=98_304, before=0.7, after=0.5)
    first = dataclasses.replace(first, tokens=10_000, teacher_tokens=50_000, distillation=distilled)
    last = dataclasses.replace(last, tokens=20_720, mask_tokens=102_400)
    record = dataclasses.replace(record, phases=(record.phases[0], first, last))
    assert figures_of(record, first)["tokens"] == 10_000 + 50_000 + 98_304
    assert figures_of(record, last)["tokens"] == 30_720 + 50_000 + 98_304 + 102_400


def test_gpu_seconds_are_the_seconds_of_each_step_times_its_gpus():
    def ran(key, name, *gpus):
        run = compared(key * 12, name)
        phases = [
            dataclasses.replace(
                phase,
                seconds={"evaluated": 100.0, "recovered": 3000.0 * phase.phase},
                accelerators=dict(zip(("evaluated", "recovered"), gpus, strict=False)),
            )
            for phase in run.record.phases
        ]
        return dataclasses.replace(run, record=dataclasses.replace(run.record, phases=tuple(phases)))

    runs = [ran("a", "eight", 2, 8), ran("b", "none", 0, 0), ran("c", "older"), ran("d", "half old", 1)]
    table = comparison_table(runs)
    columns = table.columns()
    last = runs[0].record.phases[-1].phase
    trained, evaluated = 3000 * last * (last + 1) // 2, 100 * (last + 1)
    expected = f"{8 * trained + 2 * evaluated:,}"
    assert dict(zip(columns["run"], columns["GPU-seconds"], strict=True)) == {
        "dense": "-",
        "eight": expected,
        "none": "0",
        "older": "-",
        "half old": "-",
    }
    assert set(columns["seconds"][1:]) == {seconds_text(trained + evaluated)}
    assert f"| {expected} |" in table.markdown()
    assert "times the GPUs" in " ".join(table.notes)
    without = comparison_table(runs[1:])
    assert "GPU-seconds" not in without.columns()
    assert "times the GPUs" not in " ".join(without.notes)


def test_numbers_go_into_csv_as_numbers(runs):
    rows = list(csv.DictReader(io.StringIO(comparison_table(runs, against=runs[0]).csv())))
    row = next(row for row in rows if row["key"] == "a" * 12)
    assert float(row["arc_easy_difference"]) == 0.0123
    assert (row["perplexity_verdict"], float(row["perplexity_difference_high"])) == ("worse", 1.08)
    assert float(row["params"]) == runs[1].record.phases[-1].params
    assert row["perplexity"] == str(runs[1].record.phases[-1].perplexity)
    assert "params_verdict" not in row


def test_notes_say_what_is_missing_and_what_is_not_comparable(runs):
    runs[1] = compared("a" * 12, settings={"evaluation": {"limit": 5}})
    runs[0] = compared(settings={"evaluation": {"limit": 300}})
    runs.append(compared("e" * 12, "unmeasured", "running, phase 1 of 2"))
    empty = [p.__class__(**vars(p) | {"perplexity": None, "tasks": {}}) for p in runs[-1].record.phases]
    runs[-1] = ComparedRun(
        place="s3://a/store/runs/eeeeeeeeeeee",
        key="e" * 12,
        name="unmeasured",
        state="running, phase 1 of 2",
        record=runs[-1].record.__class__(**vars(runs[-1].record) | {"phases": tuple(empty)}),
    )
    table = comparison_table(runs)
    notes = "\n".join(table.notes)
    assert "unmeasured: running, phase 1 of 2; not evaluated." in notes
    assert "bare: interrupted, phase 0 of 3; its figures are those of phase 1." in notes
    assert "run.json is damaged" in notes
    assert (
        "Measured under other settings than demo 3f9ac1, so not comparable without care: demo aaaaaa."
        in notes
    )
    assert table.columns()["perplexity"][-1] == "-"


def test_means_over_different_tasks_are_told_apart(runs):
    wide, narrow = compared(tasks=("arc_easy", "piqa", "boolq")), compared("a" * 12)
    said = [note for note in comparison_table([wide, narrow]).notes if "mean accuracy" in note]
    assert len(said) == 1
    assert said[0].endswith("all have: arc_easy, piqa.")
    assert not [note for note in comparison_table([narrow, narrow]).notes if "mean accuracy" in note]


def test_a_metric_by_a_filter_has_its_interval_too():
    run = compared()
    tasks = {"bbh": {"exact_match_get-answer": 0.4, "exact_match_stderr_get-answer": 0.01}}
    phases = [dataclasses.replace(phase, tasks=tasks) for phase in run.record.phases]
    run = dataclasses.replace(run, record=dataclasses.replace(run.record, phases=tuple(phases)))
    assert comparison_table([run]).columns()["bbh, %"][-1] == "40.0 [38.0, 42.0]"


def test_with_many_tasks_their_mean_alone_has_a_column(runs):
    wide = [compared(tasks=("arc_easy", "piqa", "boolq"))]
    assert [name for name in comparison_table(wide, most_tasks=2).metrics if name in ("piqa", "boolq")] == []
    assert "piqa" in comparison_table(wide, most_tasks=3).metrics


def test_the_page_loads_nothing_and_escapes_names(runs):
    runs[0] = compared(name="<script>alert(1)</script>$x", layers=12)
    html = comparison_page(runs, comparison_table(runs, against=runs[1]), against=runs[1])
    page = Page(html)
    assert "<script>" not in html
    assert html.count("<svg") == 2
    assert not [
        a for _, a in page.elements if any(k in ("src", "href") and v[0] != "#" for k, v in a.items())
    ]
    assert comparison_page(runs, comparison_table(runs, against=runs[1]), against=runs[1]) == html


def test_more_runs_than_colours_are_named_on_the_front_alone():
    many = [compared(f"{i:012x}", f"run-{i}", phases=2) for i in range(12)]
    html = comparison_page(many, comparison_table(many))
    assert "only these have names" in html
    assert len(html) < 400_000
