"""A checkpoint measured as the settings say: in a run's steps and by ``adapt-pruner sensitivity`` alike."""

import contextlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from core.model.build import load_model, model_shape
from core.pruning.scoring.statistics import Statistics
from core.pruning.sensitivity import losses_with_layer_pruned, plans_for_layers
from core.runs.run import Run
from core.settings.recipe import load_recipe
from core.steps.calibrate import run_calibrate
from core.steps.prepare_data import run_prepare_data
from core.steps.sensitivity import Study
from core.storage.publication import open_publication
from pipelines.cli import main
from tests.support.project import Artifact, recipe_with, resolve, write_recipe

NOT_DEFAULT = {
    "seed": 5,
    "prune.similarity": "euclidean",
    "prune.criterion": "random",
    "calibration.precision": "bfloat16",
}


@pytest.fixture
def folder(project, tmp_path):
    with contextlib.chdir(project):
        yield tmp_path


def calibrated(changes, folder):
    """Statistics of a run's first phase, and its windows of held-out text."""
    handle, base_uri = resolve(recipe_with(changes | {"storage.store": str(folder / "store")}))
    data_uri = run_prepare_data(run=handle, base_uri=base_uri)
    statistics = Artifact(folder / "statistics")
    run_calibrate(run=handle, phase=1, checkpoint_uri=base_uri, data_uri=data_uri, statistics=statistics)
    held_out = open_publication(Run.load(handle).held_out_uri()).fetch(folder / "held-out")
    return Statistics.load(statistics.path), load_file(held_out / "perplexity.safetensors")["input_ids"]


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name, value in NOT_DEFAULT.items()),
        NOT_DEFAULT | {"calibration.weights": "streamed", "calibration.state_memory": "0"},
    ],
    ids=lambda changes: " ".join(changes) if len(changes) == 1 else "all and streamed",
)
def test_sensitivity_measures_what_the_first_phase_of_a_run_does(changes, folder):
    statistics, windows = calibrated(changes, folder)
    settings = load_recipe(write_recipe(folder / "recipe.yaml", changes))
    out = folder / "out"
    command = ["sensitivity", "base", "--recipe", str(folder / "recipe.yaml"), "--output", str(out)]
    result = CliRunner().invoke(main, [*command, "--part", "mlp"])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "sensitivity.json").read_text())["layers"]
    assert [layer["importance"] for layer in found] == (1 - statistics.similarities).tolist()
    base = load_model(Path("base"))
    plans = plans_for_layers(
        statistics, model_shape(base.config), sparsity=0.5, part="mlp", attention_unit="none"
    )
    _, losses = losses_with_layer_pruned(base, windows, plans, batch_size=settings.evaluation.batch_size)
    assert [layer["loss"] for layer in found] == losses


def test_a_batch_of_0_changes_no_loss(folder):
    found = []
    for batch_size in (0, 8):
        write_recipe(folder / "recipe.yaml", {"evaluation.batch_size": batch_size})
        out = folder / f"out-{batch_size}"
        study = ["sensitivity", "base", "--recipe", str(folder / "recipe.yaml"), "--output", str(out)]
        result = CliRunner().invoke(main, [*study, "--part", "mlp"])
        assert result.exit_code == 0, result.output
        layers = json.loads((out / "sensitivity.json").read_text())["layers"]
        found.append([layer["loss"] for layer in layers])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_sensitivity_reads_layers_while_they_are_used_where_a_run_would(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "core")
    settings = load_recipe(write_recipe(folder / "recipe.yaml", {}))
    study = Study(model="base", sparsity=0.5, part="mlp", settings=settings, text=None, sequences=None)
    expected = study.run(Path("base"))
    assert "layers are read while they are used" not in caplog.text
    monkeypatch.setattr("core.steps.footprint.available_bytes", lambda device: 10**12)  # for the losses
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert study.run(Path("base")) == expected
    assert "layers are read while they are used" in caplog.text
