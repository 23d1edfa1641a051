"""Recovery training by the step, with a teacher and with adapters: what it publishes."""

import collections
import contextlib
import itertools
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from core.errors import StorageError
from core.model.build import load_model
from core.steps import lessons
from tests.support.project import Artifact, recipe_with, resolve

RANK = 2


@pytest.fixture
def recovered(project, tmp_path):
    """Calls prepare-data and recover-train, by default on the base model itself; returns the result."""
    from core.steps.prepare_data import run_prepare_data
    from core.steps.recover_train import run_recover_train

    numbers = itertools.count()

    def train(checkpoint_uri="", store=None, **training):
        changes = {f"training.{name}": value for name, value in training.items()}
        store = store or tmp_path / f"store-{next(numbers)}"  # of its own: nothing is found done
        changes |= {"prune.phases": 1, "storage.store": str(store)}
        with contextlib.chdir(project):
            run, base_uri = resolve(recipe_with(changes))
            data_uri = run_prepare_data(run=run, base_uri=base_uri)
            place = run_recover_train(
                run=run,
                phase=1,
                checkpoint_uri=checkpoint_uri or base_uri,
                data_uri=data_uri,
                model=Artifact(tmp_path / "model"),
            )
        losses = [loss for _, loss, *_ in json.loads(Path(place, "report.json").read_text())["losses"]]
        return dict(load_model(Path(place)).named_parameters()), losses, place

    return train


def test_the_teacher_is_the_dense_base_model(recovered, project):
    """Which the trained checkpoint is itself here: at first only the next token has a loss."""
    base = dict(load_model(project / "base").named_parameters())
    alone, losses, place = recovered()
    taught, mixed, _ = recovered(teacher="base", distillation_weight=0.25, temperature=2.0)
    assert mixed[0] == pytest.approx(0.75 * losses[0], rel=1e-5)
    assert not all(torch.equal(taught[name], alone[name]) for name in base)
    same, none, _ = recovered(teacher="base", distillation_weight=1.0)
    assert none == [0.0] * 5
    assert all(torch.equal(same[name], base[name]) for name in base)
    _, apart, _ = recovered(place, teacher="base", distillation_weight=1.0)
    assert apart[0] > 0.01


def test_adapters_are_merged_into_what_is_published(recovered, project):
    base = dict(load_model(project / "base").named_parameters())
    trained, *_ = recovered(lora_rank=RANK)
    assert trained.keys() == base.keys()
    for name, before in base.items():
        change = trained[name] - before
        if "_proj" in name:
            singular = torch.linalg.svdvals(change.double())
            assert singular[0] > 1e-3
            assert (singular[RANK:] < 1e-5 * singular[0]).all()
        else:
            assert not change.any()
    again, *_ = recovered(lora_rank=RANK)
    assert all(torch.equal(trained[name], again[name]) for name in base)


STORED = {"teacher": "base", "distillation_weight": 1.0, "teacher_logits": "stored", "teacher_top_k": 10**6}


def test_what_is_stored_teaches_as_the_teacher_does(recovered, caplog):
    *_, apart = recovered()
    live, wanted, _ = recovered(apart, teacher="base", distillation_weight=1.0)
    with caplog.at_level(logging.INFO):
        stored, found, place = recovered(apart, **STORED)
    assert found == pytest.approx(wanted, rel=2e-3)
    for name, weight in live.items():
        assert (stored[name] - weight).abs().mean() < 1e-4
    report = json.loads(Path(place, "report.json").read_text())
    vocabulary = len(live["lm_head.weight"])
    assert report["teacher_bytes_a_token"] == 2 * vocabulary + 2 * (vocabulary + 1)
    assert (report["teacher_kept"], report["teacher_left_out"]) == pytest.approx((1, 0), abs=1e-5)
    assert re.search(r"bytes a trained token, .* GB: they are 100\.00 % of what it expects", caplog.text)
    assert not [path for path in Path(place).rglob("*") if "lessons" in path.name], "they are read once"
    few, *_, place = recovered(apart, **STORED | {"teacher_top_k": 3})
    report = json.loads(Path(place, "report.json").read_text())
    assert 0 < report["teacher_kept"] < 0.9
    assert report["teacher_left_out"] > 0.01
    assert not all(torch.equal(few[name], stored[name]) for name in few)


def test_a_task_that_was_killed_has_the_teacher_read_only_what_is_missing(recovered, tmp_path, monkeypatch):
    """The first attempt ends in the fourth part of five; one of the three before is then damaged."""
    few = STORED | {"teacher_top_k": 3}
    monkeypatch.setattr(lessons, "PART_BYTES", 6 * 32 * 14)  # six rows a part
    written, write = [], lessons.write_lessons

    def dying(model, part, file, **options):
        written.append(part.input_ids)
        if len(written) == 4:
            raise KeyboardInterrupt
        return write(model, part, file, **options)

    monkeypatch.setattr(lessons, "write_lessons", dying)
    with pytest.raises(KeyboardInterrupt):
        recovered(store=tmp_path / "killed", **few)
    parts = sorted((tmp_path / "killed").rglob("lessons/*/lessons.safetensors"))
    assert [path.parent.name for path in parts] == ["000000", "000001", "000002"]
    parts[1].write_bytes(b"damaged")
    seen = [rows[0].tolist() for rows in written]
    _, found, _ = recovered(store=tmp_path / "killed", **few)
    again = [rows[0].tolist() for rows in written[4:]]
    assert again[:2] == [seen[1], seen[3]]
    assert len(again) == 3
    monkeypatch.undo()
    _, wanted, _ = recovered(**few)
    assert found == wanted


def test_too_little_space_for_what_the_teacher_expects_is_told_before_it_reads(recovered, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**4))
    monkeypatch.setattr("core.data.mixture._check_space", lambda *_: None)
    monkeypatch.setattr(lessons, "load_model", None)
    with pytest.raises(StorageError, match=r"bytes a trained token of a phase\), and .* has 0\.0 GB left"):
        recovered(**STORED)


@pytest.mark.slow
def test_ranks_share_out_the_reading_and_each_reads_its_rows(recovered, monkeypatch):
    monkeypatch.setattr(lessons, "PART_BYTES", 1)
    alone, wanted, _ = recovered(**STORED)
    by_two, found, _ = recovered(**STORED, ranks=2)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    for name, weight in alone.items():
        torch.testing.assert_close(by_two[name], weight, rtol=0, atol=1e-4)
