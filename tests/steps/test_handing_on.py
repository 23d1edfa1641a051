"""What one step hands on to the next: publications, which the artifacts of the UI are copies of."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.calibrate import calibrate
from components.prune_step import prune_step
from components.score_layers import score_layers
from core.errors import IntegrityError
from core.model.build import load_model
from core.model.layerwise import LayerwiseModel
from core.pruning.plan import Plan
from core.pruning.repair import Repair
from core.pruning.surgery import prune_model
from core.runs.run import Run
from core.steps.prepare_data import run_prepare_data
from core.steps.prune_step import run_prune_step
from core.steps.score_layers import run_score_layers
from core.storage.publication import find_publication
from tests.support.project import NO_TRAINING, Artifact, recipe_with, resolve


@pytest.fixture
def calibrated(project, tmp_path, monkeypatch):
    """A run whose first phase is calibrated, what its next tasks are handed, and the artifact of it."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # tasks set it
    recipe = recipe_with(NO_TRAINING | {"storage.store": str(tmp_path / "store"), "prune.phases": 3})
    handle, base_uri = resolve(recipe)
    data_uri = run_prepare_data(run=handle, base_uri=base_uri)
    given = {"run": handle, "phase": 1, "checkpoint_uri": base_uri}
    statistics = Artifact(tmp_path / "statistics")
    calibrate.python_func(**given, data_uri=data_uri, statistics=statistics)
    return Run.load(handle), given, data_uri, statistics


def test_what_artifacts_hold_changes_nothing_as_steps_read_publications(calibrated, tmp_path):
    run, given, data_uri, statistics = calibrated
    plan, model = Artifact(tmp_path / "plan"), Artifact(tmp_path / "model")
    published = Path(run.phase_uri(1, "calibrated"), "statistics.safetensors")
    assert Path(statistics.path).read_bytes() == published.read_bytes()
    Path(statistics.path).write_bytes(b"changed")
    score_layers.python_func(**given, data_uri=data_uri, statistics=statistics, plan=plan)
    content = Path(run.phase_uri(1, "scored"), "plan.json").read_bytes()
    assert Path(plan.path).read_bytes() == content
    Path(plan.path).write_bytes(b"changed")
    uri = prune_step.python_func(**given, data_uri=data_uri, plan=plan, pruned=model)
    planned = json.loads(content)
    assert sum(p.numel() for p in load_model(Path(uri)).parameters()) == planned["params_after"]
    assert planned["statistics"] == hashlib.sha256(published.read_bytes()).hexdigest()


def test_what_a_cut_leaves_is_repaired_on_the_calibration_corpus(calibrated, project, tmp_path):
    run, given, data_uri, _ = calibrated
    run_score_layers(**given, data_uri=data_uri, plan=Artifact(tmp_path / "plan"))
    uri = run_prune_step(**given, data_uri=data_uri, model=Artifact(tmp_path / "model"))
    plan = Plan.load(Path(run.phase_uri(1, "scored"), "plan.json"))
    pool = load_file(Path(data_uri, "calibration.safetensors"))["input_ids"].long()
    base = load_model(project / "base")
    cut, found = prune_model(base, plan.layers).state_dict(), load_model(Path(uri)).state_dict()
    cut = {name: tensor.clone() for name, tensor in cut.items()}
    repair = Repair(LayerwiseModel(base), pool, ridge=run.settings.prune.ridge)
    changed = set()
    for index, layer in enumerate(plan.layers):
        for name, change in repair.layer(index, layer).items():
            cut[f"model.layers.{index}.{name}"] += change
            changed.add(name)
    assert "mlp.down_proj.weight" in changed <= {"mlp.down_proj.weight", "self_attn.o_proj.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, cut[name], rtol=1e-4, atol=1e-5)


def test_statistics_and_a_plan_that_were_changed_where_they_are_published_are_named(calibrated, tmp_path):
    run, given, data_uri, _ = calibrated
    published = Path(run.phase_uri(1, "calibrated"), "statistics.safetensors")
    intact = published.read_bytes()
    published.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"calibrated/statistics\.safetensors"):
        run_score_layers(**given, data_uri=data_uri, plan=Artifact(tmp_path / "plan"))
    published.write_bytes(intact)
    run_score_layers(**given, data_uri=data_uri, plan=Artifact(tmp_path / "plan"))
    plan = Path(run.phase_uri(1, "scored"), "plan.json")
    plan.write_text(plan.read_text().replace("[0, 1", "[0, 2", 1))
    with pytest.raises(IntegrityError, match=r"scored/plan\.json"):
        run_prune_step(**given, data_uri=data_uri, model=Artifact(tmp_path / "model"))
    assert find_publication(run.phase_uri(1, "pruned")) is None
