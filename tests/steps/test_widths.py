"""The search for widths within score-layers, against the models that are really cut."""

import contextlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from core.model.build import load_model, model_shape
from core.pruning.plan import Plan
from core.pruning.surgery import prune_model
from core.runs.run import Run
from core.steps.prepare_data import run_prepare_data
from tests.pruning.test_widths import divergence
from tests.support.project import CHANNEL_PARAMS, recipe_with, resolve, run_phase

CHANGES = {
    "training.tokens": "0",
    "training.sources": [],
    "prune.phases": 1,
    "prune.repair": "none",
    "prune.steps_per_phase": 1,
    "storage.keep": "all",
}


def test_a_searched_phase_is_closer_to_its_checkpoint_at_the_same_size(project, tmp_path):
    plans, runs = {}, {}
    with contextlib.chdir(project):
        for rule in ("similarity", "search"):
            store = str(tmp_path / rule)
            handle, uri = resolve(recipe_with(CHANGES | {"prune.widths": rule, "storage.store": store}))
            data_uri = run_prepare_data(run=handle, base_uri=uri)
            run_phase(handle, 1, uri, data_uri, tmp_path / rule)
            runs[rule] = Run.load(handle)
            plans[rule] = Plan.load(Path(runs[rule].phase_uri(1, "scored")) / "plan.json")
    run = runs["search"]
    pool = load_file(Path(run.uri("data"), "calibration.safetensors"))["input_ids"].long()
    generator = torch.Generator().manual_seed(run.settings.seed * 1_000_003 + 998)
    tokens = pool[torch.randperm(len(pool), generator=generator)][:171]  # of 24: 4,096 tokens
    model = load_model(project / "base")
    found = {rule: divergence(model, prune_model(model, plan.layers), tokens) for rule, plan in plans.items()}
    assert found["search"] < found["similarity"]
    for plan in plans.values():
        assert abs(plan.params_after - plan.target_params) <= CHANNEL_PARAMS / 2
    assert plans["search"].params_before == model_shape(model.config).num_params()
    assert plans["search"].importance == plans["similarity"].importance
