"""The compared methods through the steps of a run: what comes out is loaded by transformers itself."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.model.build import load_model
from core.pruning.scoring.calibration import draw_calibration, measure
from core.pruning.scoring.statistics import Statistics
from core.runs.run import Run
from core.settings.methods import WHOLE_LAYERS
from core.storage.layout import CALIBRATION_POOL, STATISTICS
from tests.conftest import tokenizer_of
from tests.support.project import CHANNEL_PARAMS, make_project, recipe_with, rewrite_base, run_all

NO_TRAINING = {"training.tokens": "0", "training.sources": [], "prune.phases": 2, "prune.target": "84%"}


@pytest.fixture(scope="module")
def projects(tokenizer_definition, tmp_path_factory):
    tokenizer = tokenizer_of(tokenizer_definition)
    llama = make_project(tmp_path_factory.mktemp("methods") / "llama", tokenizer)
    qwen2 = make_project(tmp_path_factory.mktemp("methods") / "qwen2", tokenizer)
    rewrite_base(qwen2 / "base", {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    return {"llama": llama, "qwen2": qwen2}


QUICK = ("flap", "grail", "shortgpt")
SLOW = ("llm-pruner", "minitron", "minitron-depth", "magnitude", "random", "modegpt", "sheared-llama")


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(method, family, marks=[] if method in QUICK else pytest.mark.slow)
        for method in (*QUICK, *SLOW)
        for family in ("llama", "qwen2")
    ],
)
def test_a_run_of_two_phases_ends_at_the_size_in_a_model_that_transformers_loads(
    method, family, projects, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    changes = {"prune.method": method, "prune.amplitude": 0.02, "storage.store": str(tmp_path / "store")}
    base = load_model(projects[family] / "base")
    wanted = 0.84 * sum(p.numel() for p in base.parameters())
    changes |= {"prune.mask_steps": 3, "prune.mask_rate": 1.0} if method == "sheared-llama" else {}
    if method in WHOLE_LAYERS:  # so that a layer goes in each phase
        layer = sum(p.numel() for p in base.model.layers[0].parameters())
        wanted = sum(p.numel() for p in base.parameters()) - round(2.3 * layer)
        changes["prune.target"] = str(wanted)
    with contextlib.chdir(projects[family]):
        handle, final = run_all(recipe_with(NO_TRAINING | changes), tmp_path)
    model, run = load_model(Path(final)), Run.load(handle)
    pool = load_file(Path(run.uri("data"), CALIBRATION_POOL))["input_ids"]
    tokens = draw_calibration(pool, sequences=12, seed=run.settings.seed, step=0)
    criterion = run.settings.prune.applied().criterion
    expected = measure(base, tokens, criterion=criterion, seed=run.settings.seed)
    measured = Statistics.load(Path(run.phase_uri(1, "calibrated"), STATISTICS))
    for found, own in zip(measured.scores, expected.scores, strict=True):
        torch.testing.assert_close(found.mlp_channels, own.mlp_channels, rtol=1e-3, atol=1e-4)
    params = sum(p.numel() for p in model.parameters())
    assert abs(params - wanted) <= CHANNEL_PARAMS / 2
    stock = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    assert stock.generate(tokens, max_new_tokens=2, min_new_tokens=2).shape == (1, 22)
    record = json.loads((Path(final) / "record.json").read_text())
    assert [phase["params"] for phase in record["phases"]][2] == params
    layers = [[size["mlp_width"] for size in phase["layers"]] for phase in record["phases"]]
    if method in WHOLE_LAYERS:
        assert [sum(width == 0 for width in phase) for phase in layers] == [0, 1, 2]
        assert model.config.num_hidden_layers == 1
    assert [width for width in layers[2] if width] == [
        layer.mlp.up_proj.out_features for layer in model.model.layers
    ]
    assert record["settings"]["prune"]["method"] == run.settings.prune.method == method
