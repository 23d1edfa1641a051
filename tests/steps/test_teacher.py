"""A teacher that is trained on the run's texts before it teaches: the base model, by the training loop."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

import core.training.recover
from core.model.build import load_model
from core.model.checkpoint import Checkpoint
from core.report.card import model_card
from core.report.report import build_report
from core.runs.gathering import collect_record
from core.runs.run import Run
from core.settings.recipe import settings_from_dict
from core.steps.footprint import training_footprint
from core.steps.needs import needs_of_tasks
from core.steps.prepare_data import run_prepare_data
from core.steps.recover_train import run_recover_train
from core.storage.garbage import find_garbage
from core.storage.publication import MANIFEST, find_publication
from core.storage.store import open_store
from core.training.recover import recover
from core.training.rows import Rows
from tests.support.project import Artifact, recipe_with, resolve

STEPS, BATCH, TOKENS = 3, 6, 3 * 6 * 32
"""Of the teacher: more than the first of two slices has."""
TAUGHT = {"teacher": "base", "distillation_weight": 0.75, "teacher_tokens": str(TOKENS)}


class Begun:
    """A run of two phases whose checkpoints are cut nowhere: each phase trains the base model."""

    def __init__(self, folder, store, **changes):
        self.folder = folder
        recipe = recipe_with({"storage.store": str(store)} | changes)
        self.handle, self.base_uri = resolve(recipe)
        self.run = Run.load(self.handle)
        self.data_uri = run_prepare_data(run=self.handle, base_uri=self.base_uri)

    def train(self, phase=1, checkpoint_uri=""):
        return run_recover_train(
            run=self.handle,
            phase=phase,
            checkpoint_uri=checkpoint_uri or self.base_uri,
            data_uri=self.data_uri,
            model=Artifact(self.folder / "model"),
        )

    @property
    def teacher(self):
        return find_publication(self.run.uri("teacher"))


@pytest.fixture
def begun(project, tmp_path):
    """Begins a run, in a store of its own unless one is named."""
    numbers = itertools.count()

    def begin(store=None, base="base", tracking="", **training):
        changes = {f"training.{name}": value for name, value in training.items()}
        changes |= {"model.base": base, "tracking.uri": tracking}
        return Begun(tmp_path, store or tmp_path / f"store-{next(numbers)}", **changes)

    with contextlib.chdir(project):
        yield begin


def weights_of(folder):
    return dict(load_model(Path(folder)).named_parameters())


def files_of(published):
    entries = published.manifest.files
    return {entry.path: entry.sha256 for entry in entries if entry.path != "report.json"}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packing", ["whole", pytest.param("cut", marks=pytest.mark.slow)])
def test_the_teacher_is_the_base_model_trained_on_the_first_rows_of_the_mixture(begun, packing):
    run = begun(**TAUGHT, packing=packing)
    run.train()
    slices = [load_file(Path(run.data_uri, f"slices/phase-0{phase}.safetensors")) for phase in (1, 2)]
    rows = {name: torch.cat([part[name] for part in slices])[: STEPS * BATCH] for name in slices[0]}
    assert len(slices[0]["input_ids"]) < STEPS * BATCH
    assert ("starts" in rows) == (packing == "whole")
    model = load_model(Path(run.base_uri), dtype=torch.float32)
    plain = settings_from_dict(recipe_with({"training.tokens": str(TOKENS), "training.packing": packing}))
    report = recover(model, Rows(**rows), plain.training, first_step=0, total_steps=STEPS)
    assert same(weights_of(run.teacher.uri), dict(model.named_parameters()))
    found = run.teacher.read_json("report.json")
    assert found["losses"] == json.loads(json.dumps(report.losses))
    assert found["tokens"] == TOKENS
    assert not same(weights_of(run.teacher.uri), weights_of(run.base_uri))


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["live", "stored"])
def test_it_teaches_as_a_base_model_of_its_weights_does(begun, logits, tmp_path):
    with_it = begun(**TAUGHT, teacher_logits=logits)
    found = with_it.train()
    shutil.copytree(with_it.teacher.uri, tmp_path / "teacher")
    (tmp_path / "teacher" / MANIFEST).unlink()
    given = {name: value for name, value in TAUGHT.items() if name != "teacher_tokens"}
    as_base = begun(base=str(tmp_path / "teacher"), **given, teacher_logits=logits)
    wanted = as_base.train(checkpoint_uri=with_it.base_uri)
    assert as_base.teacher is None
    assert same(weights_of(found), weights_of(wanted))
    losses = [json.loads(Path(place, "report.json").read_text())["losses"] for place in (found, wanted)]
    assert losses[0] == losses[1]
    untrained = begun(**given, teacher_logits=logits).train()
    assert not same(weights_of(found), weights_of(untrained))


@pytest.mark.slow
def test_one_that_was_killed_goes_on_and_one_that_is_there_is_not_trained_again(begun, tmp_path, monkeypatch):
    taken, take = [], core.training.recover._train_step

    def counting(*arguments):
        if len(taken) == dies_at:
            raise KeyboardInterrupt
        taken.append(1)
        return take(*arguments)

    monkeypatch.setattr(core.training.recover, "_train_step", counting)
    dies_at, settings = None, TAUGHT | {"save_every": "1 steps", "tokens": "1920", "teacher_tokens": "1152"}
    whole = begun(**settings)
    whole.train()
    of_phases = [3, 7]
    assert len(taken) == 6 + of_phases[0]
    whole.train(2)
    assert len(taken) == 6 + sum(of_phases)
    taken.clear()
    dies_at = 4
    killed = begun(tmp_path / "killed", **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert killed.teacher is None
    states = list(Path(killed.run.uri("teacher")).rglob("state.json"))
    assert states
    dies_at = None
    killed.train()
    assert 6 + of_phases[0] <= len(taken) < 4 + 6 + of_phases[0], "it goes on from a state"
    assert files_of(whole.teacher) == files_of(killed.teacher)
    assert not list(Path(killed.run.uri("teacher")).rglob("state.json"))


@pytest.mark.slow
def test_it_goes_when_the_last_phase_has_trained_and_comes_back_with_a_phase_that_is_lost(begun, tmp_path):
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    run = begun(tmp_path / "store", tracking=tracking, **TAUGHT)
    run.train(1)
    client = MlflowClient(tracking)
    (logged,) = client.search_runs(["1"], "tags.`adapt_pruner.step` = 'teacher'")
    curve = [(each.step, each.value) for each in client.get_metric_history(logged.info.run_id, "loss")]
    assert curve == [(step, loss) for step, loss, _ in run.teacher.read_json("report.json")["losses"]]
    assert run.teacher.is_whole()
    before = run.teacher
    run.train(2)
    assert not run.teacher.is_whole()
    assert run.teacher.read_json("report.json")["tokens"] == TOKENS, "for the report"
    shutil.rmtree(run.run.phase_uri(2, "recovered"))
    again = begun(tmp_path / "store", tracking=tracking, **TAUGHT)
    assert again.teacher is None
    assert [piece.place for piece in find_garbage(open_store(run.run.store), patience_s=0).garbage] == []
    again.train(2)
    assert files_of(again.teacher) == files_of(before)


def test_its_tokens_and_time_are_told_beside_those_of_the_first_phase(begun):
    run = begun(**TAUGHT)
    run.train()
    record = collect_record(run.run, "", (0, 1))
    (dense, first) = record.phases
    assert (dense.teacher_tokens, first.teacher_tokens, first.tokens) == (0, TOKENS, 192)
    assert first.seconds["teacher"] > 0
    assert first.seconds.keys() <= first.accelerators.keys()
    assert "576 tokens of the teacher" in build_report(record)
    assert "itself trained on 576 tokens" in model_card(record, config={}, licence={})
    assert "teacher" not in collect_record(run.run, "", (0, 2)).phases[1].seconds


@pytest.mark.parametrize(("logits", "width", "larger"), [("stored", 4000, True), ("live", 40, False)])
def test_recover_train_is_planned_for_what_is_larger_of_both_trainings(project, logits, width, larger):
    """A smaller model that learns from stored logits may take less than the base, one beside it more."""
    config = Checkpoint(project / "base").config
    config.intermediate_size = width

    def settings(**training):
        changes = {f"training.{name}": value for name, value in training.items()}
        return settings_from_dict(recipe_with({"cluster.gpus": 0, "prune.phases": 1} | changes))

    given = TAUGHT | {"teacher_logits": logits}
    before = needs_of_tasks(config, settings(**given | {"teacher_tokens": "0"}))["recover-train"]
    after = needs_of_tasks(config, settings(**given))["recover-train"]
    alone = training_footprint(config, None, settings().training, device="cpu", stored_bytes=4)
    assert (alone.device_bytes > before.device_bytes) == larger
    assert after.parts == (alone if larger else before).parts
    assert after.host_bytes == max(alone.host_bytes, before.host_bytes)
    assert after.disk_bytes == max(alone.disk_bytes + 6 * TOKENS, before.disk_bytes)
