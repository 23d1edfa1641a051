"""The steps that measure and distil, killed in the midst of it, go on there and publish the same."""

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from core.runs.run import Run
from core.steps import distilling, kept_training, measuring, stages
from core.steps.calibrate import run_calibrate
from core.steps.prepare_data import run_prepare_data
from core.steps.prune_step import run_prune_step
from core.steps.score_layers import run_score_layers
from core.steps.stages import SavedStages
from core.storage.publication import open_publication
from core.training import resume
from core.training.pace import Pace
from tests.support.project import Artifact, recipe_with, resolve

CHANGES = {
    "prune.phases": 1,
    "prune.steps_per_phase": 3,
    "prune.distill_steps": 6,
    "prune.distill_batch_tokens": "48",
    "training.tokens": "0",
}


EARLIER_S = 1000
"""What a kept training says that it took, beyond what it took."""


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Whatever this process took before, and however small the machine."""
    monkeypatch.setattr(stages, "spare_bytes", lambda: 10**9)


class KilledError(Exception):
    pass


class Always(Pace):
    """Saves after each step, when what was saved before is stored."""

    def __init__(self, every=None, **_):
        super().__init__(every)

    def is_due(self, done, *, size, transferring):
        return not transferring


def killed_at(call, monkeypatch):
    """Let the stages and states be kept each time, and the ``call``-th time be the last."""
    calls = []

    def happens():
        calls.append(1)
        if len(calls) == call:
            raise KilledError

    class Stages(SavedStages):
        def __init__(self, *args, **given):
            super().__init__(*args, **given, worth_s=0, pace=Always())

        def is_due(self, share, size):
            happens()
            if self._under_way is not None:
                self._under_way.result()
            return super().is_due(share, size)

    class States(resume.SavedStates):
        def save(self, model, optimizer, progress):
            happens()
            super().save(model, optimizer, replace(progress, seconds=progress.seconds + EARLIER_S))
            self._publisher.submit(int).result()

    monkeypatch.setattr(measuring, "SavedStages", Stages)
    monkeypatch.setattr(distilling, "SavedStates", States)
    monkeypatch.setattr(kept_training, "SavedStates", States)
    monkeypatch.setattr(resume, "Pace", Always)


@pytest.fixture(scope="module")
def begin(project, tmp_path_factory):
    """Prepare a run in a store of its own, and say how its steps up to prune-step are called."""
    folder = tmp_path_factory.mktemp("kept")
    numbers = iter(range(100))

    def begin(changes):
        place = folder / f"{next(numbers)}"
        with contextlib.chdir(project):
            handle, uri = resolve(recipe_with(changes | {"storage.store": str(place)}))
            data_uri = run_prepare_data(run=handle, base_uri=uri)
        given = {"run": handle, "phase": 1, "checkpoint_uri": uri, "data_uri": data_uri}
        steps = {
            "calibrated": lambda: run_calibrate(**given, statistics=Artifact(folder / "s")),
            "scored": lambda: run_score_layers(**given, plan=Artifact(folder / "p")),
            "pruned": lambda: run_prune_step(**given, model=Artifact(folder / "m")),
        }
        return Run.load(handle), steps

    return begin


@pytest.fixture(scope="module")
def undisturbed(begin):
    run, steps = begin(CHANGES)
    for step in steps.values():
        step()
    return run


def test_kept_work_belongs_to_one_checkpoint_one_corpus_and_one_set_of_settings(begin):
    run, _ = begin(CHANGES)
    other = replace(run, settings=replace(run.settings, seed=run.settings.seed + 1))
    kinds = [run.inputs("a", "b"), run.inputs("c", "b"), run.inputs("a", "c"), other.inputs("a", "b")]
    assert all(one != another for one, another in itertools.combinations(kinds, 2))


KILLS = {"calibrated": 4, "scored": 7, "pruned": 4}
"""Step to the call that it does not survive: in the backward pass, a second measurement, the distillation."""


@pytest.mark.slow
def test_killed_in_the_midst_of_it(begin, undisturbed, monkeypatch, caplog):
    caplog.set_level("INFO", "core")
    run, steps = begin(CHANGES)
    for name, step in steps.items():
        with monkeypatch.context() as patch:
            killed_at(KILLS[name], patch)
            with pytest.raises(KilledError):
                step()
        kept = Path(run.phase_uri(1, name), "_resume")
        assert any(kept.rglob("MANIFEST.json"))
        caplog.clear()
        step()
        resumed = "resumed at step 3 of 6" if name == "pruned" else "goes on after"
        assert resumed in caplog.text
        assert not kept.exists()
        found, expected = (open_publication(each.phase_uri(1, name)) for each in (run, undisturbed))
        assert found.digest == expected.digest
    report = found.read_json("report.json")
    assert report["seconds"] > EARLIER_S, "with what the killed attempt has given to it"


MASKS = {
    "prune.method": "sheared-llama",
    "prune.amplitude": 0.02,
    "prune.mask_steps": 6,
    "prune.mask_rate": 1.0,
    "prune.distill_batch_tokens": "48",
    "prune.phases": 1,
    "training.tokens": "0",
}


def test_the_learning_of_masks_goes_on_where_it_was_killed(begin, monkeypatch, caplog):
    caplog.set_level("INFO", "core")
    expected, steps = begin(MASKS)
    steps["calibrated"]()
    steps["scored"]()
    run, steps = begin(MASKS)
    steps["calibrated"]()
    with monkeypatch.context() as patch:
        killed_at(4, patch)
        with pytest.raises(KilledError):
            steps["scored"]()
    kept = Path(run.phase_uri(1, "scored"), "_resume")
    assert any(kept.rglob("MANIFEST.json"))
    assert "resumed" not in caplog.text
    steps["scored"]()
    assert "the learning of masks resumed at step 3 of 6" in caplog.text
    assert not kept.exists()
    found, undisturbed = (open_publication(each.phase_uri(1, "scored")) for each in (run, expected))
    assert found.digest == undisturbed.digest
    report = found.read_json("report.json")
    assert report["mask_losses"] == undisturbed.read_json("report.json")["mask_losses"]
    assert len(report["mask_losses"]) == 6
    assert report["seconds"] > EARLIER_S, "with what the killed attempt has given to it"
