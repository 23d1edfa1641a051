"""The frame of every step."""

import pytest
import torch

from core.runs.gathering import collect_record
from core.runs.run import Run
from core.steps.frame import compute_once
from tests.support.stored_runs import write_run


def test_a_step_says_how_many_accelerators_it_took(tmp_path, monkeypatch):
    key = write_run(tmp_path / "store", "trial", phases=3, done=1)
    run = Run.load({"store": str(tmp_path / "store"), "key": key})

    def step(name, **report):
        uri = run.phase_uri(2, name)
        compute_once(run, uri, phase=2, step=name, compute=lambda _: dict(report))

    step("calibrated", seconds=30.0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    step("pruned", seconds=20.0)
    step("recovered", seconds=100.0, accelerators=8)
    (phase,) = collect_record(run, "", [2]).phases
    assert phase.accelerators == {"calibrated": 0, "pruned": 1, "recovered": 8}
    assert phase.gpu_seconds == pytest.approx(20 + 800, abs=100)
    assert phase.gpu_seconds == phase.seconds["pruned"] + 8 * phase.seconds["recovered"]
    (older,) = collect_record(run, "", [1]).phases
    assert (older.accelerators, older.gpu_seconds) == ({}, None)


def test_a_part_of_a_task_that_is_done_is_not_said_to_be_the_task(tmp_path, caplog):
    caplog.set_level("INFO")
    run = Run.load({"store": str(tmp_path), "key": write_run(tmp_path, "trial", phases=3, done=1)})
    for whole, said in ((False, "its part generate was done before"), (True, "already done")):
        uri = run.uri(f"{whole}")
        for _ in range(2):
            caplog.clear()
            compute_once(run, uri, phase=0, step="generate", compute=lambda _: {}, whole=whole)
        assert [record.message for record in caplog.records] == [said]
