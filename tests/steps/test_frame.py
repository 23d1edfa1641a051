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
