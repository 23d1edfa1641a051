"""The report grows while a run goes on: in the store after each evaluation, and locally beside it."""

import io
import json
import logging

import pytest
from rich.console import Console

from core.errors import StorageError
from core.runs.run import Run
from core.steps.evaluate import write_report_so_far
from core.storage.garbage import find_garbage
from core.storage.store import LocalStore, open_store
from pipelines.local.progress import RunProgress
from pipelines.local.run import copy_report_so_far
from tests.support.stored_runs import write_run


@pytest.fixture
def started(tmp_path):
    store = tmp_path / "store"
    key = write_run(store, "trial", phases=3, layers=2, done=2)
    return Run.load({"store": str(store), "key": key}), store / "runs" / key / "report.html"


def test_the_store_has_a_report_of_the_phases_so_far(started):
    run, path = started
    write_report_so_far(run, 2)
    html = path.read_text()
    assert "so far: phase 2 of 3" in html
    assert f"{run.phase_params[1]:,}" in html
    assert f"{run.phase_params[2]:,}" not in html
    # It is the run's own: cleaning neither removes it nor wonders at it.
    found = find_garbage(open_store(run.store), patience_s=0)
    assert not [key for key in found.foreign if "report.html" in key]
    assert not [file for piece in found.garbage for file in piece.files if file.key.endswith("/report.html")]


def test_an_evaluation_that_ends_late_does_not_set_the_report_back(started):
    run, path = started
    write_report_so_far(run, 2)
    before = path.read_text()
    write_report_so_far(run, 1)
    assert path.read_text() == before


def test_a_report_that_cannot_be_written_costs_no_result(started, monkeypatch, caplog):
    def full(*_, **__):
        raise StorageError("the disk is full.")

    monkeypatch.setattr(LocalStore, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        write_report_so_far(started[0], 2)
    assert "the report so far is not written: the disk is full." in caplog.text


def test_a_local_run_copies_it_after_each_evaluation(started, tmp_path):
    run, _ = started
    write_report_so_far(run, 2)
    root, output = tmp_path / "kfp", tmp_path / "output"
    told = root / "some-task" / "resolve-base" / "executor_output.json"
    ended = []
    console = Console(file=io.StringIO())
    with RunProgress(console, phases=3, ended=ended.append).reading(io.StringIO()):
        print("12:00:00 INFO phase 2 evaluate: started\n12:00:09 INFO phase 2 evaluate: done in 9 s")
    assert ended == ["evaluate"]
    output.mkdir()
    copy_report_so_far(root, output, "evaluate")  # before anything is known
    told.parent.mkdir(parents=True)
    told.write_text(json.dumps({"parameterValues": {"run": run.handle()}}))
    copy_report_so_far(root, output, "calibrate")
    assert not (output / "report.html").exists()
    copy_report_so_far(root, output, "evaluate")
    assert "so far: phase 2 of 3" in (output / "report.html").read_text()
