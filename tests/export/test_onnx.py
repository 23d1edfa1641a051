import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import CheckpointError, ExportError
from core.export.onnx import export_onnx
from core.export.onnx_genai import genai_config
from core.model.build import load_model, load_tokenizer
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import config_with_layers, head_dim, layer_shapes, load_config
from core.model.families import family_of
from core.pruning.plan import LayerPlan
from core.pruning.surgery import prune_model
from tests.support.models import CONFIGS, LLAMA3, UNEQUAL, random_tokens, tiny

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

# An export takes five seconds and more. This one has windows, biases and norms of heads.
QUICK = "qwen3"
TRACED = [name for name in CONFIGS if name != "phi3-longrope"]


class Runtime:
    """The exported graph in ONNX Runtime, with the cache in the caller's hands."""

    def __init__(self, folder):
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = runtime.InferenceSession(folder / "model.onnx", options)
        shapes = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self.past = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}

    def step(self, tokens, mask, past=None, positions=None):
        """Logits of ``tokens``, the last ones of ``mask``, and the cache for the next step."""
        if past is None:
            past = [np.zeros((len(tokens), k, 0, a), np.float32) for _, k, _, a in self.past.values()]
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        feeds = {name: tensor.numpy() for name, tensor in feeds.items()}
        logits, *present = self.session.run(None, feeds | dict(zip(self.past, past, strict=True)))
        return torch.from_numpy(logits), present

    def in_steps(self, tokens, *lengths):
        """Logits of ``tokens``, of which each step takes the next few."""
        done, past, logits = 0, None, []
        for length in lengths:
            mask = torch.ones(len(tokens), done + length, dtype=torch.long)
            part, past = self.step(tokens[:, done : done + length], mask, past)
            logits.append(part)
            done += length
        return torch.cat(logits, 1)


def sizes(name):
    if family_of(CONFIGS[name]()).prunes_heads:
        return UNEQUAL
    return tuple(replace(layer, query_heads=6, kv_heads=3) for layer in UNEQUAL)


def write(folder, name, **changes):
    """A tiny model's checkpoint; ``changes`` to its config, none to its weights."""
    model = tiny(name, sizes(name), dtype=torch.float32)
    save_model(model, folder, companions=None, provenance={})
    changed = type(model.config).from_dict(model.config.to_dict() | changes)
    config_with_layers(changed, sizes(name)).save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in TRACED],
)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = write(folder / "pruned", request.param)
    return model, export_onnx(folder / "pruned", folder / "onnx")


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (4, 12), (3, 40)])
def test_logits_are_those_of_the_model_for_any_number_of_rows_and_tokens_in_any_steps(exported, rows, length):
    model, result = exported
    graph, tokens = Runtime(result.path), random_tokens(rows, length)
    expected = logits_of(model, tokens)
    assert_equal(graph.in_steps(tokens, length), expected)
    assert_equal(graph.in_steps(tokens, *[1] * length), expected)
    if length > 4:
        assert_equal(graph.in_steps(tokens, 1, length - 4, 3), expected)


def test_padding_on_the_left_changes_nothing_then_or_later(exported):
    model, result = exported
    graph, tokens, following = Runtime(result.path), random_tokens(3, 11), random_tokens(3, 1, seed=5)
    padded = [4, 0, 1]
    mask = torch.tensor([[0] * count + [1] * (11 - count) for count in padded])
    first, past = graph.step(tokens, mask)
    second, _ = graph.step(following, torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1), past)
    assert first.isfinite().all()
    for row, count in enumerate(padded):
        alone = torch.cat([tokens[row, count:], following[row]])[None]
        found = torch.cat([first[row, count:], second[row]])[None]
        assert_equal(found, logits_of(model, alone))


def test_positions_are_those_that_the_caller_gives(exported):
    model, result = exported
    tokens, positions = random_tokens(2, 8), torch.tensor([[0, 1, 2, 3, 10, 11, 12, 30]]).repeat(2, 1)
    found, _ = Runtime(result.path).step(tokens, torch.ones_like(tokens), positions=positions)
    with torch.no_grad():
        expected = model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits
    assert_equal(found, expected)
    assert not torch.allclose(expected, logits_of(model, tokens), atol=1e-2)


def test_each_layer_keeps_its_own_number_of_kv_heads(exported):
    model, result = exported
    graph, layers = Runtime(result.path), layer_shapes(model.config)
    expected = [layer.kv_heads for layer in layers for _ in ("key", "value")]
    assert [shape[1] for shape in graph.past.values()] == expected
    _, present = graph.step(random_tokens(2, 7), torch.ones(2, 7, dtype=torch.long))
    assert [part.shape for part in present] == [(2, k, 7, head_dim(model.config)) for k in expected]


def test_onnx_runtime_genai_writes_the_same_text(exported):
    genai = pytest.importorskip("onnxruntime_genai")
    model, result = exported
    described = genai.Model(str(result.path))
    tokens = random_tokens(2, 9)
    parameters = genai.GeneratorParams(described)
    parameters.set_search_options(max_length=21, min_length=21, do_sample=False, batch_size=2)
    generator = genai.Generator(described, parameters)
    generator.append_tokens(tokens.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = model.generate(tokens, max_length=21, min_length=21, do_sample=False)
    assert [list(generator.get_sequence(row)) for row in range(2)] == expected.tolist()


def test_the_folder_is_complete_and_tells_nothing_of_where_it_was_made(exported):
    model, result = exported
    files = {path.name for path in result.path.iterdir()}
    assert files >= {"model.onnx", "model.onnx_data", "config.json", "genai_config.json"}
    assert result.params == sum(parameter.numel() for parameter in model.parameters())
    assert layer_shapes(load_config(result.path)) == layer_shapes(model.config)
    assert b".py" not in (result.path / "model.onnx").read_bytes()
    assert any("KV heads" in note for note in result.notes) == (
        len({layer.kv_heads for layer in layer_shapes(model.config)}) > 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "phi3", "qwen3", "smollm3"])
def test_windows_that_are_longer_than_the_traced_text_hide_what_lies_before_them(tmp_path, name):
    model = write(tmp_path / "pruned", name, sliding_window=16)
    graph = Runtime(export_onnx(tmp_path / "pruned", tmp_path / "onnx").path)
    tokens = random_tokens(2, 40)
    expected = logits_of(model, tokens)
    assert_equal(graph.in_steps(tokens, 40), expected)
    assert_equal(graph.in_steps(tokens, *[1] * 40), expected)


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("rope", [YARN, LLAMA3, LINEAR], ids=["yarn", "llama3", "linear"])
def test_positions_beyond_the_original_ones_turn_as_in_the_model(tmp_path, rope):
    model = write(tmp_path / "pruned", "llama", rope_parameters=rope)
    graph = Runtime(export_onnx(tmp_path / "pruned", tmp_path / "onnx").path)
    tokens = random_tokens(2, 40)
    assert_equal(graph.in_steps(tokens, 10, 20, 10), logits_of(model, tokens))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotary_frequencies_that_move_with_the_length_are_refused(tmp_path, rope_type):
    changes = {} if rope_type == "longrope" else {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}
    write(tmp_path / "pruned", "phi3-longrope" if rope_type == "longrope" else "llama", **changes)
    with pytest.raises(ExportError, match=f"rotary scaling is {rope_type}, whose frequencies may change"):
        export_onnx(tmp_path / "pruned", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path / "pruned", "llama")
    monkeypatch.setattr("core.export.onnx.find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ExportError, match=r"needs the Python package onnxscript\. Run pip install"):
        export_onnx(tmp_path / "pruned", tmp_path / "onnx")


def test_the_end_tokens_and_the_sampling_are_the_generation_configs(tmp_path):
    write(tmp_path / "pruned", "llama")
    generation = dict(eos_token_id=[7, 9], do_sample=True, temperature=0.6, top_p=0.9, max_length=20)
    (tmp_path / "pruned" / "generation_config.json").write_text(json.dumps(generation))
    described = genai_config(Checkpoint(tmp_path / "pruned"), "model.onnx")
    decoder = described["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (
        6,
        3,
        10,
    )
    assert described["model"]["eos_token_id"] == [7, 9, 2]
    assert described["model"]["pad_token_id"] == 2
    assert {name: described["search"].get(name) for name in ("temperature", "top_p", "top_k")} == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
    }
    assert described["search"]["max_length"] == 64
    (tmp_path / "pruned" / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not a JSON object"):
        genai_config(Checkpoint(tmp_path / "pruned"), "model.onnx")


@pytest.mark.slow
def test_a_pruned_smollm2_answers_as_in_pytorch(smollm2, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    model = load_model(smollm2, dtype=torch.float32)
    plans = [
        LayerPlan(
            query_heads=tuple(range(6 if index % 3 == 1 else 9)),
            kv_heads=tuple(range(2 if index % 3 == 1 else 3)),
            mlp_channels=tuple(range(index % 2, 1536 - 37 * (index % 4))),
        )
        for index in range(30)
    ]
    save_model(prune_model(model, tuple(plans)), tmp_path / "pruned", companions=smollm2, provenance={})
    result = export_onnx(tmp_path / "pruned", tmp_path / "onnx")
    model, tokenizer = load_model(tmp_path / "pruned"), load_tokenizer(tmp_path / "pruned")
    described = genai.Model(str(result.path))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    tokens = genai.Tokenizer(described).encode(text)
    assert tokens.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    parameters = genai.GeneratorParams(described)
    parameters.set_search_options(max_length=len(tokens) + 24, do_sample=False)
    generator = genai.Generator(described, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    prompt = torch.from_numpy(tokens)[None].long()
    expected = model.generate(prompt, max_length=len(tokens) + 24, do_sample=False)[0].tolist()
    # This runtime leaves the end token out.
    written = generator.get_sequence(0).tolist()
    assert written == expected[: len(written)]
    assert expected[len(written) :] == [tokenizer.eos_token_id]
    assert_equal(Runtime(result.path).in_steps(prompt, *[1] * len(tokens)), logits_of(model, prompt))
