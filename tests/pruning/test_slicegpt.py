"""SliceGPT: rotations that change nothing, slices that lose the last components and nothing else."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from core.errors import CheckpointError, ExportError, SettingsError, TargetError, UnsupportedModelError
from core.export.decilm import export_decilm
from core.export.gguf import export_gguf
from core.export.onnx import export_onnx
from core.export.padded import export_padded
from core.model.build import load_model, model_of, model_shape
from core.model.checkpoint import Checkpoint, save_model, write_checkpoint
from core.model.config import head_dim, layer_shapes
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel, open_streamed
from core.pruning.methods.slicegpt import sliced_config, sliced_parts
from core.pruning.scoring.calibration import draw_calibration
from core.runs.run import Run
from core.settings.recipe import settings_from_dict
from core.storage.layout import CALIBRATION_POOL
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny
from tests.support.project import recipe_with, resolve, run_all

ONE_PHASE = {"prune.method": "slicegpt", "prune.phases": 1, "prune.amplitude": 0.02}
SLICEABLE = [name for name in CONFIGS if family_of(CONFIGS[name]()).slices_width]
TOKENS = random_tokens(rows=6)
WIDTH = 24


def params_of(config, width):
    """Parameters of a sliced model, summed by hand."""
    size, full, vocabulary = head_dim(config), config.hidden_size, config.vocab_size
    qkv_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    mlp_bias = getattr(config, "mlp_bias", False)
    output_bias = getattr(config, "output_biases", False)
    o_bias, down_bias = getattr(config, "attention_bias", False) or output_bias, mlp_bias or output_bias
    head_norms = 2 * size if config.model_type == "qwen3" else 0
    total = vocabulary * width + vocabulary * full + full
    for index, layer in enumerate(layer_shapes(config)):
        end = full if index + 1 == config.num_hidden_layers else width
        queries, keys, f = layer.query_heads * size, layer.kv_heads * size, layer.mlp_width
        total += (queries + 2 * keys) * (width + qkv_bias) + width * (queries + o_bias)
        total += 2 * f * (width + mlp_bias) + end * (f + down_bias)
        total += width * width + width * end + 2 * width + head_norms
    return total


def sliced(model, width, tokens=TOKENS):
    config = sliced_config(model.config, params_of(model.config, width))
    parts = sliced_parts(LayerwiseModel(model), tokens, config.sliced_hidden_size)
    state = {name: tensor.to(model.dtype) for part in parts for name, tensor in part.items()}
    return model_of(config, state, dtype=model.dtype, device="cpu")


@pytest.mark.parametrize("layers", [None, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", SLICEABLE)
def test_at_full_width_the_rotated_model_gives_the_dense_models_logits(name, layers):
    model, tokens = tiny(name, layers), random_tokens(seed=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad(), Float64Throughout():
        rotated = sliced(model, 48)
        torch.testing.assert_close(rotated(tokens).logits, model(tokens).logits, rtol=0, atol=1e-8)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    change = rotated.model.layers[1].attn_shortcut.weight
    assert (change - torch.eye(48)).abs().max() > 0.1, "nothing was rotated"


@pytest.mark.parametrize("name", SLICEABLE)
def test_the_size_is_what_the_formula_says(name):
    model = tiny(name)
    for width in (8, 40):
        small = sliced(model, width)
        assert small.config.sliced_hidden_size == width
        assert sum(p.numel() for p in small.parameters()) == params_of(model.config, width)
        assert model_shape(small.config).num_params() == params_of(model.config, width)


def signals_of(model, tokens):
    """(tokens, width) what enters each of the two blocks of each layer."""
    seen, hooks = [], []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1))))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def projected(rows, width):
    """Rows in the span of their first principal components, by a singular value decomposition."""
    basis = torch.linalg.svd(rows, full_matrices=False).Vh[:width]
    return rows @ basis.T @ basis


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-tied"])
def test_each_slice_loses_the_tail_of_the_principal_components_and_nothing_else(name):
    """Against the dense model, whose signal is projected before each block."""
    model = tiny(name)
    model.config.rms_norm_eps = 0.5  # none that rounding would hide
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    with torch.no_grad(), Float64Throughout():
        small = sliced(model, WIDTH)
        found = signals_of(small, TOKENS)
        states, calls = model.model.embed_tokens(TOKENS), LayerwiseModel(model)
        calls.embed(TOKENS)
        for index, layer in enumerate(model.model.layers):
            whole = states.flatten(0, 1)
            check_slice(whole, found[2 * index])
            states = projected(whole, WIDTH).view_as(states)
            mlp, layer.mlp = layer.mlp, Zero()
            states, layer.mlp = calls.run(index, states), mlp
            whole = states.flatten(0, 1)
            check_slice(whole, found[2 * index + 1])
            states = projected(whole, WIDTH).view_as(states)
            states = states + mlp(layer.post_attention_layernorm(states))
        logits = model.lm_head(model.model.norm(states))
        torch.testing.assert_close(small(TOKENS).logits, logits, rtol=0, atol=1e-8)


class Zero(torch.nn.Module):
    def forward(self, states):
        return torch.zeros_like(states)


def check_slice(whole, found):
    """``found``, a rotated slice of ``whole``, has lost the energy of the last components and no more."""
    lost = whole.square().sum() - found.square().sum()
    tail = torch.linalg.svdvals(whole)[WIDTH:].square().sum()
    assert tail > 1e-4 * whole.square().sum()
    torch.testing.assert_close(lost, tail, rtol=1e-8, atol=0)
    torch.testing.assert_close(found @ found.T, projected(whole, WIDTH) @ whole.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "qwen3", "smollm3"])
def test_layers_at_a_time_and_in_micro_batches_it_is_the_same(name, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path / "base", companions=None, provenance={})
    checkpoint = Checkpoint(tmp_path / "base")
    with Float64Throughout():
        at_once = sliced(model, WIDTH)
        config = sliced_config(checkpoint.config, params_of(model.config, WIDTH))
        parts = sliced_parts(open_streamed(checkpoint), TOKENS, WIDTH, micro_batch=2)
        parts = ({name: tensor.double() for name, tensor in part.items()} for part in parts)
        write_checkpoint(tmp_path / "small", config, parts, 4, companions=None, provenance={})
    loaded = load_model(tmp_path / "small")
    assert loaded.config.sliced_hidden_size == WIDTH
    tokens = random_tokens(seed=3)
    with torch.no_grad():  # eigenvectors have either sign, logits do not depend on it
        torch.testing.assert_close(loaded(tokens).logits, at_once(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SLICEABLE)
def test_a_checkpoint_keeps_every_bit_here_and_in_stock_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, tokens = sliced(tiny(name, dtype=torch.float32), WIDTH), random_tokens()
    save_model(model, tmp_path / name, companions=None, provenance={})
    here = load_model(tmp_path / name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
    for loaded in (here, stock):
        assert loaded.dtype == torch.float32
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    stock.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SLICEABLE)
def test_cached_decoding_equals_the_full_forward(name, attention):
    tokens = random_tokens()
    with torch.no_grad(), Float64Throughout():
        model = sliced(tiny(name), WIDTH)
        model.set_attn_implementation("eager")
        full = model(tokens, use_cache=False).logits
        model.set_attn_implementation(attention)
        output, steps = None, []
        for position in range(tokens.shape[1]):
            past = {} if output is None else {"past_key_values": output.past_key_values}
            output = model(tokens[:, position : position + 1], use_cache=True, **past)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-10)


def test_generation_is_greedy_decoding_by_hand():
    model, prompt = sliced(tiny("llama-tied"), WIDTH), random_tokens(rows=1, length=5)
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    model.generation_config.eos_token_id = None
    assert model.generate(prompt, max_new_tokens=6, do_sample=False).tolist() == expected.tolist()


def test_every_weight_is_trained_and_recomputed_activations_change_nothing():
    model, tokens = sliced(tiny("qwen2-tied"), WIDTH), random_tokens()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.train()
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for once, again in zip(*gradients, strict=True):
        assert once.abs().max() > 0
        torch.testing.assert_close(once, again)


def test_the_nearest_width_is_taken():
    config = CONFIGS["llama"]()
    at = [params_of(config, width) for width in (16, 24)]
    for target, width in ((at[0], 16), (at[0] + 1, 16), (sum(at) // 2 - 1, 16), (sum(at) // 2 + 1, 24)):
        assert sliced_config(config, target).sliced_hidden_size == width
    assert sliced_config(config, 10**9).sliced_hidden_size == 48
    with pytest.raises(TargetError, match=r"8 columns the model has [\d,]+\. Raise prune\.target"):
        sliced_config(config, params_of(config, 8) - 1)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "granite"])
def test_a_family_with_more_than_plain_sums_is_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"cannot be sliced: .* Choose another prune\.method"):
        sliced_config(CONFIGS[name](), 10**6)


def test_a_sliced_model_is_not_pruned_again():
    with pytest.raises(UnsupportedModelError, match=r"sliced_hidden_size=24\): .* not pruned again"):
        LayerwiseModel(sliced(tiny("llama"), WIDTH))


def test_a_signal_that_is_not_finite_is_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 0] = torch.inf
    with pytest.raises(CheckpointError, match="after the attention of layer 1 is not finite"):
        sliced(model, WIDTH)


@pytest.fixture
def folder(tmp_path):
    save_model(sliced(tiny("llama"), WIDTH), tmp_path / "sliced", companions=None, provenance={})
    return tmp_path / "sliced"


@pytest.mark.parametrize(
    ("export", "name"),
    [(export_gguf, "GGUF"), (export_decilm, "a DeciLM"), (export_padded, "a padded checkpoint")],
)
def test_formats_without_shortcut_matrices_refuse_it(export, name, folder, tmp_path):
    with pytest.raises(ExportError, match=rf"cannot be exported as {name}.*sliced_hidden_size=24"):
        export(folder, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["sliced"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliced_hidden_size": 49}, "from 1 to 48"),
        ({"sliced_hidden_size": "24"}, "whole number"),
        ({"sliced_hidden_size": 0}, "whole number"),
        ({"tie_word_embeddings": True}, "cannot be tied"),
        ({"sliced_hidden_size": 16}, "weights do not fit config.json"),
        ({"model_type": "granite"}, "cannot be sliced"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, said, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=said):
        load_model(folder)


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """A run with training: its handle, the folder of its store, and the final checkpoint."""
    store = tmp_path_factory.mktemp("sliced") / "store"
    with contextlib.chdir(project):
        recipe = recipe_with({**ONE_PHASE, "storage.store": str(store), "storage.keep": "all"})
        handle, final = run_all(recipe, store.parent)
    return Run.load(handle), Path(final)


@pytest.mark.slow
def test_a_run_slices_trains_and_evaluates(finished, project):
    run, final = finished
    base = load_model(project / "base")
    target = round(0.75 * sum(p.numel() for p in base.parameters()))
    widths = range(8, 49, 8)
    width = min(widths, key=lambda width: abs(params_of(base.config, width) - target))
    pruned, trained = load_model(Path(run.phase_uri(1, "pruned"))), load_model(final)
    for model in (pruned, trained):
        assert model.config.sliced_hidden_size == width
        assert sum(p.numel() for p in model.parameters()) == params_of(base.config, width)
    pairs = zip(pruned.parameters(), trained.parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in pairs)
    record = json.loads((final / "record.json").read_text())
    assert [phase["params"] for phase in record["phases"]][1] == params_of(base.config, width)
    losses = [phase["perplexity"] for phase in record["phases"]]
    assert all(loss > 0 for loss in losses)
    assert "`sliced_hidden_size`" in (final / "README.md").read_text()


def test_a_run_slices_by_the_tokens_that_a_repair_would_get(finished, project):
    run, _ = finished
    pool = load_file(Path(f"{run.store}/runs/{run.key}/data") / CALIBRATION_POOL)["input_ids"]
    tokens = draw_calibration(pool, sequences=len(pool), seed=7, step=999)
    with torch.no_grad():
        found = load_model(Path(run.phase_uri(1, "pruned")))
        here = sliced(load_model(project / "base"), found.config.sliced_hidden_size, tokens)
        torch.testing.assert_close(found(tokens).logits, here(tokens).logits, rtol=1e-3, atol=1e-3)


def test_what_a_run_cannot_do_is_refused_before_it_starts(project, finished, tmp_path):
    with pytest.raises(SettingsError, match=r"phases=2: .*it takes one\. Set phases to 1"):
        settings_from_dict(recipe_with({**ONE_PHASE, "prune.phases": 2}))
    for name, value in {"profile": "portable", "criterion": "obs", "attention_unit": "kv_group"}.items():
        with pytest.raises(SettingsError, match=f"{name}={value} contradicts method=slicegpt"):
            settings_from_dict(recipe_with({**ONE_PHASE, f"prune.{name}": value}))
    with contextlib.chdir(project):
        store = {"storage.store": str(tmp_path / "store")}
        with pytest.raises(TargetError, match=r"prune\.method=slicegpt.*Raise prune\.target"):
            resolve(recipe_with({**ONE_PHASE, **store, "prune.target": "5%"}))
        with pytest.raises(UnsupportedModelError, match="not pruned again"):
            resolve(recipe_with({**store, "model.base": str(finished[1])}))


@pytest.mark.slow
def test_an_onnx_graph_holds_it(tmp_path):
    pytest.importorskip("onnxscript")
    from tests.export.test_onnx import Runtime

    model, tokens = sliced(tiny("qwen2-tied", dtype=torch.float32), WIDTH), random_tokens()
    save_model(model, tmp_path / "sliced", companions=None, provenance={})
    export_onnx(tmp_path / "sliced", tmp_path / "onnx")
    logits = Runtime(tmp_path / "onnx").in_steps(tokens, 5, 1, 6)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-4)
