"""``precision: auto``: the choice of a machine, which a run keeps."""

import contextlib
import json
import logging

import pytest
import torch

from core.errors import StorageError
from core.machine import precision
from core.machine.precision import choose_precision, cpu_rates, resolved, warn_if_emulated
from core.report.report import build_report
from core.runs.gathering import collect_record
from core.runs.run import Run
from core.settings.evaluation import EvaluationSettings
from core.storage.garbage import find_garbage
from core.storage.store import LocalStore, open_store
from tests.support.project import recipe_with, resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SECTIONS = ("calibration", "training", "evaluation")
AUTO = {f"{section}.precision": "auto" for section in SECTIONS}
FASTER = {"float32": {"float32": 82.0, "bfloat16": 7.9}, "bfloat16": {"float32": 166.0, "bfloat16": 325.0}}


@pytest.fixture
def machine(monkeypatch):
    """Let this machine be one that is faster in the given format; None: it must not be measured."""

    def become(faster):
        def rates():
            assert faster is not None, "measured"
            return dict(FASTER[faster])

        monkeypatch.setattr(precision, "cpu_rates", rates)

    return become


@pytest.fixture
def begin(project, tmp_path):
    """Begin the recipe in a store, and return its run."""

    def begin_in(store="store", *, accelerated=(), **changes):
        recipe = recipe_with(AUTO | {"storage.store": str(tmp_path / store)} | changes)
        with contextlib.chdir(project):
            handle, _ = resolve(recipe, accelerated=accelerated)
        return Run.load(handle)

    return begin_in


def formats(run):
    return {getattr(run.settings, section).precision for section in SECTIONS}


# --- what a machine chooses


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [
        (82.0, 7.9, "float32"),
        (166.0, 325.0, "bfloat16"),
        (100.0, 119.9, "float32"),
        (100.0, 120.1, "bfloat16"),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_if_that_is_clearly_faster(monkeypatch, float32, bfloat16, chosen):
    monkeypatch.setattr(precision, "cpu_rates", lambda: {"float32": float32, "bfloat16": bfloat16})
    choice = choose_precision(CPU)
    assert choice.precision == chosen
    assert f"{float32:.1f} GFLOP/s in float32 and {bfloat16:.1f} GFLOP/s in bfloat16" in str(choice)


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_computes_in_bfloat16_where_it_is_native(monkeypatch, machine, native, chosen):
    machine(None)
    asked = []

    def is_supported(including_emulation=True):
        asked.append(including_emulation)
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    choice = choose_precision(GPU)
    assert (choice.precision, asked) == (chosen, [False])
    assert "Tesla T4" in str(choice)


def test_any_other_device_computes_in_float32(machine):
    machine(None)
    assert choose_precision(torch.device("mps")).precision == "float32"


def test_measuring_gives_rates_of_both_formats_and_leaves_threads_and_random_numbers_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    rates = cpu_rates(budget_s=0.0)
    assert rates.keys() == {"float32", "bfloat16"}
    assert all(0.01 < rate < 1e5 for rate in rates.values())  # GFLOP/s of one thread
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_named_is_not_measured(machine):
    machine(None)
    named = EvaluationSettings(precision="bfloat16")
    assert resolved(named, lambda: choose_precision(CPU)) is named


@pytest.mark.parametrize(
    ("name", "device", "native", "warned"),
    [
        ("bfloat16", GPU, False, True),
        ("bfloat16", GPU, True, False),
        ("float32", GPU, False, False),
        ("bfloat16", CPU, False, False),
    ],
)
def test_a_task_warns_once_if_its_gpu_has_no_bfloat16(monkeypatch, caplog, name, device, native, warned):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    warn_if_emulated("training", name, device)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == warned
    assert all(line.startswith("training.precision=bfloat16, but Tesla T4") for line in lines)


# --- a run keeps what it began with


def test_a_run_keeps_what_it_began_with_whatever_machine_resumes_it(machine, begin):
    machine("float32")
    first = begin()
    machine("bfloat16")
    second = begin()
    assert (second.key, formats(second), second.chosen) == (first.key, {"float32"}, first.chosen)
    machine(None)
    assert begin().key == first.key


def test_machines_that_choose_differently_in_two_stores_have_two_keys(machine, begin):
    machine("float32")
    first = begin("one")
    machine("bfloat16")
    second = begin("two")
    assert (formats(first), formats(second)) == ({"float32"}, {"bfloat16"})
    assert first.key != second.key


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_a_named_precision_and_an_automatic_one_that_comes_to_it_are_the_same_run(machine, begin, faster):
    machine(faster)
    automatic = begin()
    machine(None)
    named = begin(**dict.fromkeys(AUTO, faster))
    assert named.key == automatic.key
    assert automatic.chosen.keys() == set(SECTIONS)
    assert named.chosen == {}


def test_each_recipe_has_a_choice_of_its_own(machine, begin):
    machine("float32")
    first = begin()
    machine("bfloat16")
    other = begin(seed=8)
    assert (formats(first), formats(other)) == ({"float32"}, {"bfloat16"})
    kept = begin(**{"training.precision": "bfloat16"})
    assert kept.settings.training.precision == kept.settings.calibration.precision == "bfloat16"


def test_tasks_that_get_accelerators_compute_in_bfloat16_without_measuring(machine, begin):
    machine(None)
    run = begin("all", accelerated=SECTIONS)
    assert formats(run) == {"bfloat16"}
    assert set(run.chosen.values()) == {"auto, for the accelerators of the cluster"}
    machine("float32")
    run = begin("one", accelerated=["training"])
    found = [getattr(run.settings, section).precision for section in SECTIONS]
    assert found == ["float32", "bfloat16", "float32"]


def test_of_two_that_begin_at_once_both_take_the_first_ones_choice(machine, begin, monkeypatch):
    machine("float32")
    write = LocalStore.write_bytes

    def second(store, key, data, *, if_absent=False):
        if key.startswith("precisions/") and if_absent:
            other = {name: {**choice, "precision": "bfloat16"} for name, choice in choices(data).items()}
            write(store, key, json.dumps({"format": 1, "choices": other}).encode())
        return write(store, key, data, if_absent=if_absent)

    monkeypatch.setattr(LocalStore, "write_bytes", second)
    assert formats(begin()) == {"bfloat16"}


def choices(content):
    return json.loads(content)["choices"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object"),
        (b'{"format": 1}', "it lacks choices"),
        (b'{"format": 1, "choices": {}}', "it lacks calibration, training, evaluation"),
        (
            b'{"format": 1, "choices": {"training": {"precision": "f8", "device": "", "gflop_per_s": {}}}}',
            "choices.training.precision: input should be 'float32' or 'bfloat16'",
        ),
        (b'{"format": 1, "choices": {"training": 3}}', "choices.training: input should be an object"),
    ],
)
def test_a_damaged_note_is_one_error_that_says_what_to_do(machine, begin, tmp_path, content, problem):
    machine("float32")
    key = begin().key
    (note,) = (tmp_path / "store/precisions").iterdir()
    note.write_bytes(content)
    with pytest.raises(StorageError) as error:
        begin()
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{note} is damaged: ")
    assert problem in line
    assert begin(**dict.fromkeys(AUTO, "float32")).key == key  # what the error advises


# --- it is reported, and it stays


def test_record_report_and_log_say_what_was_used_and_why(machine, begin, caplog):
    machine("float32")
    with caplog.at_level(logging.INFO, "core"):
        run = begin(**{"evaluation.precision": "bfloat16"})
    record = collect_record(run, "", [])
    rates = "82.0 GFLOP/s in float32 and 7.9 GFLOP/s in bfloat16"
    assert record.settings["training"]["precision"] == "float32"
    assert all(rates in record.chosen[section] for section in ("calibration", "training"))
    assert "evaluation" not in record.chosen
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))) == record
    html = build_report(record)
    assert html.count(rates) == 2
    assert f"training.precision=float32 ({record.chosen['training']})" in caplog.messages


def test_mlflow_has_the_format_as_a_parameter_and_the_reason_as_a_tag(machine, begin, tmp_path):
    from mlflow import MlflowClient

    machine("float32")
    run = begin(**{"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    (found,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    for section in SECTIONS:
        assert found.data.params[f"{section}.precision"] == "float32"
        assert found.data.tags[f"adapt_pruner.precision.{section}"] == run.chosen[section]


def test_cleaning_leaves_the_choice_and_removes_what_was_half_written(machine, begin, tmp_path):
    machine("float32")
    begin()
    half = tmp_path / "store/precisions/.a.json.0123abcd.part"
    half.write_bytes(b"{")
    found = find_garbage(open_store(tmp_path / "store"), patience_s=0.0)
    places = {(piece.place, file.key) for piece in found.garbage for file in piece.files}
    assert {key for place, key in places if "precisions" in place} == {"precisions/.a.json.0123abcd.part"}
    assert found.foreign == []


def test_evaluate_without_a_run_chooses_for_this_machine(machine, project, caplog):
    from core.settings.texts import TextSource
    from pipelines.commands.evaluate import settled

    machine("bfloat16")
    settings = EvaluationSettings(
        perplexity=TextSource(path=str(project / "held-out.txt")), perplexity_windows=1
    )
    with caplog.at_level(logging.INFO, "core"):
        assert settled(project / "base", settings).precision == "bfloat16"
    assert any(line.startswith("bfloat16, auto, for one thread of") for line in caplog.messages)
