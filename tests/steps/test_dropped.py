"""Checkpoints go when their last reader is done, and come back only where something is computed from them."""

import contextlib
import logging
import shutil

import pytest

from core.runs.run import Run
from core.steps.prepare_data import run_prepare_data
from core.storage.publication import find_publication, open_publication
from tests.support.project import evaluate, recipe_with, resolve, run_phase

pytestmark = pytest.mark.slow


@pytest.fixture
def begun(project, tmp_path, monkeypatch):
    """Begins, or takes up, a run of three phases; returns its handle, base and data."""
    monkeypatch.chdir(project)

    def begin(**changes):
        recipe = recipe_with(
            {"prune.phases": 3, "storage.store": str(tmp_path / "store")}
            | {name.replace("__", "."): value for name, value in changes.items()}
        )
        handle, base_uri = resolve(recipe)
        return handle, base_uri, run_prepare_data(run=handle, base_uri=base_uri)

    return begin


def whole(handle):
    """The checkpoints that hold their weights, as (phase, step)."""
    run = Run.load(handle)
    return [
        (phase, step)
        for phase in (1, 2, 3)
        for step in ("pruned", "recovered")
        if (found := find_publication(run.phase_uri(phase, step))) is not None and found.is_whole()
    ]


def test_a_run_under_way_holds_no_checkpoint_that_nothing_reads(begun, tmp_path):
    handle, uri, data_uri = begun()
    for phase in (1, 2, 3):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path)
        assert whole(handle) == [(phase, "recovered")]


def test_checkpoints_stay_until_they_are_evaluated(begun, tmp_path, monkeypatch):
    handle, base_uri, data_uri = begun()
    with monkeypatch.context() as waiting:  # for a machine, while the next phase works
        waiting.setattr("tests.support.project.evaluate", lambda *_: None)
        first = run_phase(handle, 1, base_uri, data_uri, tmp_path)
    run_phase(handle, 2, first, data_uri, tmp_path)
    assert whole(handle) == [(1, "pruned"), (1, "recovered"), (2, "recovered")]
    evaluate(handle, 1, first, data_uri, tmp_path / "later")
    assert whole(handle) == [(2, "recovered")]


@pytest.mark.parametrize(("keep", "kept"), [("all", {1, 2}), ("1", {1, 2}), ("3", set())])
def test_what_storage_keep_asks_for_stays(begun, tmp_path, keep, kept):
    handle, uri, data_uri = begun(storage__keep=keep)
    for phase in (1, 2):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path)
    asked = {(phase, step) for phase in kept for step in ("pruned", "recovered")}
    assert set(whole(handle)) == asked | {(2, "recovered")}


def test_the_best_so_far_stays(begun, tmp_path):
    handle, uri, data_uri = begun(storage__keep="best")
    for phase in (1, 2, 3):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path)
    run = Run.load(handle)
    perplexities = [
        open_publication(run.measured_uri(phase)).read_json("report.json")["perplexity"]
        for phase in (1, 2, 3)
    ]
    best = min((1, 2, 3), key=lambda phase: perplexities[phase - 1])
    assert {phase for phase, _ in whole(handle)} == {best, 3}


def test_taking_a_run_up_computes_nothing_again_that_was_dropped(begun, tmp_path, caplog):
    handle, uri, data_uri = begun()
    for phase in (1, 2):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path)
    caplog.clear()
    handle, base_uri, data_uri = begun()
    with caplog.at_level(logging.INFO):
        again = base_uri
        for phase in (1, 2):
            again = run_phase(handle, phase, again, data_uri, tmp_path / "again")
    assert again == uri
    assert "is needed again" not in caplog.text
    assert "computing" not in caplog.text
    assert whole(handle) == [(2, "recovered")]
    run_phase(handle, 3, again, data_uri, tmp_path)


def test_only_what_a_lost_result_is_made_from_is_computed_again(begun, tmp_path, caplog):
    handle, uri, data_uri = begun()
    for phase in (1, 2, 3):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path)
    run = Run.load(handle)
    digests = {
        step: open_publication(run.phase_uri(3, step)).digest for step in ("pruned", "scored", "recovered")
    }
    shutil.rmtree(run.phase_uri(3, "recovered"))
    with caplog.at_level(logging.INFO):
        handle, uri, data_uri = begun()
    needed = [record.getMessage() for record in caplog.records if "is needed again" in record.getMessage()]
    assert len(needed) == 5  # all but the last recovered: each is made from the one before
    for phase in (1, 2, 3):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path / "again")
    assert {step: open_publication(run.phase_uri(3, step)).digest for step in digests} == digests


def test_other_measurements_of_a_run_under_way_compute_nothing_again(begun, tmp_path, caplog):
    handle, uri, data_uri = begun()
    for phase in (1, 2):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path)
    with caplog.at_level(logging.INFO):
        handle, uri, data_uri = begun(evaluation__perplexity_length=16)
        for phase in (1, 2, 3):
            uri = run_phase(handle, phase, uri, data_uri, tmp_path / "other")
    assert "is needed again" not in caplog.text
    assert "not measured: storage.keep=last has kept no checkpoint" in caplog.text
    reports = [
        open_publication(Run.load(handle).measured_uri(phase)).read_json("report.json") for phase in (1, 2, 3)
    ]
    assert ["perplexity" in report for report in reports] == [False, True, True]


def test_without_training_the_pruned_checkpoint_is_the_result_of_a_phase(begun, tmp_path):
    handle, uri, data_uri = begun(training__tokens="0", training__sources=[])
    with contextlib.suppress(FileNotFoundError):
        for phase in (1, 2, 3):
            uri = run_phase(handle, phase, uri, data_uri, tmp_path)
            assert whole(handle) == [(phase, "pruned")]
