"""Methods that make a model of their own: it is published beside the plan, and then cut."""

import contextlib
import logging
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.errors import PlanError, TargetError
from core.export.gguf import export_gguf
from core.model.build import load_model
from core.model.checkpoint import CheckpointReader
from core.pruning.methods.pruned import pruned_model
from core.pruning.scoring.calibration import draw_calibration
from core.pruning.scoring.statistics import Statistics
from core.runs.gathering import collect_record
from core.runs.run import Run
from core.settings.prune import decides_on_model
from core.steps.prepare_data import run_prepare_data
from core.steps.prune_step import run_prune_step
from core.storage.layout import CALIBRATION_POOL, STATISTICS
from core.storage.publication import find_publication, open_publication, publish
from tests.conftest import tokenizer_of
from tests.support.project import (
    CHANNEL_PARAMS,
    Artifact,
    make_project,
    recipe_with,
    resolve,
    rewrite_base,
    run_all,
    run_phase,
)

STEPS, BATCH = 4, 4
MASKS = {
    "prune.method": "sheared-llama",
    "prune.mask_steps": STEPS,
    "prune.mask_rate": 1.0,
    "prune.distill_batch_tokens": str(24 * BATCH),
    "prune.phases": 1,
    "prune.target": "70%",
    "prune.amplitude": 0.02,
    "training.tokens": "0",
    "training.sources": [],
}


def begun(project, store, **changes):
    """A run whose first phase is calibrated and decided; what its tasks are handed."""
    from core.steps.calibrate import run_calibrate
    from core.steps.score_layers import run_score_layers

    recipe = recipe_with(MASKS | {"storage.store": str(store)} | changes)
    handle, uri = resolve(recipe)
    given = {"run": handle, "phase": 1, "checkpoint_uri": uri}
    given["data_uri"] = run_prepare_data(run=handle, base_uri=uri)
    run_calibrate(**given, statistics=Artifact(store.parent / "statistics"))
    run_score_layers(**given, plan=Artifact(store.parent / "plan"))
    return Run.load(handle), given


def in_memory(run, project, draw, sequences):
    """What the method leaves of the base model in memory, on the same tokens."""
    pool = load_file(Path(run.uri("data"), CALIBRATION_POOL))["input_ids"]
    tokens = draw_calibration(pool, sequences=min(sequences, len(pool)), seed=run.settings.seed, step=draw)
    return pruned_model(
        load_model(project / "base"),
        Statistics.load(Path(run.phase_uri(1, "calibrated"), STATISTICS)),
        settings=run.settings.prune,
        target_params=run.phase_params[0],
        remeasure=None,
        tokens=tokens,
        seed=run.settings.seed + 1,
    )


@pytest.fixture(params=["llama", "qwen2"])
def base(request, project, tokenizer_definition, tmp_path):
    if request.param == "llama":
        return project
    folder = make_project(tmp_path / "qwen2", tokenizer_of(tokenizer_definition))
    rewrite_base(folder / "base", {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    return folder


def test_a_run_with_learnt_masks_is_what_they_leave_in_memory(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with contextlib.chdir(base), caplog.at_level(logging.INFO):
        handle, final = run_all(recipe_with(MASKS | {"storage.store": str(tmp_path / "store")}), tmp_path)
    run, found = Run.load(handle), load_model(Path(final))
    expected = in_memory(run, base, 997, STEPS * BATCH)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)
    dense = load_model(base / "base")
    params = sum(p.numel() for p in found.parameters())
    assert abs(params - 0.7 * sum(p.numel() for p in dense.parameters())) <= CHANNEL_PARAMS / 2
    changed = dense.model.embed_tokens.weight - found.model.embed_tokens.weight
    assert changed.abs().max() > 1e-5, "the weights are learnt, too"
    stock = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(stock(tokens).logits, found(tokens).logits)
    assert stock.generate(tokens, max_new_tokens=2, min_new_tokens=2).shape == (1, 22)
    _, phase = collect_record(run, "", [0, 1]).phases
    assert phase.mask_tokens == STEPS * BATCH * 24
    assert 0 < phase.mask_s < phase.seconds["scored"]
    for name, text in {
        "README.md": "384 tokens on which masks",
        "report.html": "384 tokens of masks",
    }.items():
        assert text in (Path(final) / name).read_text()
    assert "memory: the learning of masks needs about" in caplog.text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "the learning of masks"),
        ({"prune.method": "slicegpt"}, "the slicing"),
        ({"prune.method": "minitron-depth"}, "the choice of layers"),
        (
            {"prune.method": "minitron", "prune.hidden_size": "50%", "prune.target": "45%"},
            "the ranking of embedding channels",
        ),
    ],
)
def test_the_memory_of_a_decision_is_announced_by_its_name(changes, what, project, tmp_path, caplog):
    with contextlib.chdir(project), caplog.at_level(logging.INFO):
        run, given = begun(project, tmp_path / "store", **changes)
        run_prune_step(**given, model=Artifact(tmp_path / "model"))
    assert given["run"]["key"] == run.key
    assert f"memory: {what} needs about" in caplog.text
    assert "the repair" not in caplog.text
    assert decides_on_model(run.settings.prune)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "draw", "sequences"), [("minitron", 999, 10**6), ("sheared-llama", 997, STEPS * BATCH)]
)
def test_a_run_to_fewer_embedding_channels_is_what_that_leaves_in_memory(
    method, draw, sequences, base, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    changes = {"prune.method": method, "prune.hidden_size": "50%", "prune.target": "45%"}
    changes |= {"storage.store": str(tmp_path / "store"), "training.tokens": "0"}
    with contextlib.chdir(base):
        handle, final = run_all(recipe_with(MASKS | changes), tmp_path)
    run, found = Run.load(handle), load_model(Path(final))
    expected = in_memory(run, base, draw, sequences)
    assert found.config.hidden_size == expected.config.hidden_size == 24
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)
    dense = load_model(base / "base")
    params = sum(p.numel() for p in found.parameters())
    assert abs(params - 0.45 * sum(p.numel() for p in dense.parameters())) <= CHANNEL_PARAMS / 4
    stock = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(stock(tokens).logits, found(tokens).logits)
    assert stock.generate(tokens, max_new_tokens=2, min_new_tokens=2).shape == (1, 22)


@pytest.mark.slow
def test_a_run_to_fewer_layers_by_masks_is_what_that_leaves_in_memory(project, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    changes = {"prune.layers": "2", "prune.target": "75%", "storage.store": str(tmp_path / "store")}
    with contextlib.chdir(project):
        handle, final = run_all(recipe_with(MASKS | changes | {"prune.attention_unit": "none"}), tmp_path)
    run, found = Run.load(handle), load_model(Path(final))
    expected = in_memory(run, project, 997, STEPS * BATCH)
    assert found.config.num_hidden_layers == expected.config.num_hidden_layers == 2
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)
    params = sum(p.numel() for p in found.parameters())
    dense = sum(p.numel() for p in load_model(project / "base").parameters())
    assert abs(params - 0.75 * dense) <= CHANNEL_PARAMS / 2
    stock = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(stock(tokens).logits, found(tokens).logits)
    exported = gguf.GGUFReader(export_gguf(Path(final), tmp_path / "model.gguf").path)
    assert {int(tensor.name.split(".")[1]) for tensor in exported.tensors if "blk" in tensor.name} == {0, 1}
    _, phase = collect_record(run, "", [0, 1]).phases
    assert [layer.mlp_width > 0 for layer in phase.layers].count(False) == 1


@pytest.mark.parametrize(
    ("layers", "target", "problem"),
    [
        ("1", "90%", r"layers=1 alone leaves .* \(1 of 3 layers\), fewer than the target"),
        ("2", "50%", r"attention whole .* in each of 2 layers"),
    ],
)
def test_layers_that_do_not_suit_the_size_are_refused_before_anything_runs(layers, target, problem, project):
    changes = {"prune.layers": layers, "prune.target": target, "prune.attention_unit": "none"}
    with contextlib.chdir(project), pytest.raises(TargetError, match=problem):
        resolve(recipe_with(MASKS | changes))


def weights_of(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


def test_what_is_learnt_goes_when_it_is_cut_and_is_learnt_again_where_the_cut_is_lost(project, tmp_path):
    with contextlib.chdir(project):
        run, given = begun(project, tmp_path / "store")
        scored, pruned = (Path(run.phase_uri(1, step)) for step in ("scored", "pruned"))
        learnt = weights_of(scored)
        assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}
        uri = run_prune_step(**given, model=Artifact(tmp_path / "model"))
        cut = weights_of(pruned)
        assert sorted(path.name for path in scored.iterdir()) == ["MANIFEST.json", "plan.json", "report.json"]
        shutil.rmtree(pruned)
        assert not open_publication(run.phase_uri(1, "scored")).is_whole()
        again, base_uri = resolve(recipe_with(MASKS | {"storage.store": str(tmp_path / "store")}))
        assert again["key"] == run.key
        assert find_publication(run.phase_uri(1, "scored")) is None
        assert run_phase(again, 1, base_uri, given["data_uri"], tmp_path) == uri
    for name, tensor in weights_of(pruned).items():
        torch.testing.assert_close(tensor, cut[name], rtol=1e-5, atol=1e-6)


def test_a_plan_without_the_model_that_it_was_made_for_is_refused(project, tmp_path):
    """An earlier version published the plan of a slice alone."""
    with contextlib.chdir(project):
        run, given = begun(project, tmp_path / "store", **{"prune.method": "slicegpt"})
        scored = Path(run.phase_uri(1, "scored"))
        (tmp_path / "alone").mkdir()
        for name in ("plan.json", "report.json"):
            shutil.move(scored / name, tmp_path / "alone")
        shutil.rmtree(scored)
        publish(tmp_path / "alone", run.phase_uri(1, "scored"))
        with pytest.raises(PlanError, match=r"the plan of phase 1 leaves .*Remove .*scored, and run"):
            run_prune_step(**given, model=Artifact(tmp_path / "model"))
