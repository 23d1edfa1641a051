"""Recovery training by the step, with a teacher and with adapters: what it publishes."""

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch

from core.model.build import load_model
from tests.support.project import Artifact, recipe_with, resolve

RANK = 2


@pytest.fixture
def recovered(project, tmp_path):
    """Calls prepare-data and recover-train, by default on the base model itself; returns the result."""
    from core.steps.prepare_data import run_prepare_data
    from core.steps.recover_train import run_recover_train

    numbers = itertools.count()

    def train(checkpoint_uri="", **training):
        changes = {f"training.{name}": value for name, value in training.items()}
        store = tmp_path / f"store-{next(numbers)}"  # of its own: nothing is found done
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
