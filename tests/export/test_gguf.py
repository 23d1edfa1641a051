import json

import gguf
import numpy as np
import pytest
import torch

from core.errors import AdaptPrunerError, CheckpointError, ExportError
from core.export.gguf import export_gguf
from core.export.gguf_layout import architecture_of
from core.export.gguf_quantization import quantization_notes, quantized_q8_0
from core.model.build import build_model, load_model
from core.model.checkpoint import CheckpointReader, save_model
from core.model.config import config_with_layers, layer_shapes, load_config
from core.model.shape import LayerShape
from tests.support.llamacpp import LlamaCpp
from tests.support.models import CONFIGS, UNEQUAL, random_tokens

EQUAL = (LayerShape(query_heads=6, kv_heads=3, mlp_width=40),) * 3
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=2.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
QWEN3 = dict(attention_bias=False, use_sliding_window=False, layer_types=None)
LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=4.0)


@pytest.fixture
def make(tmp_path, tokenizer):
    """Write a checkpoint of random weights with a tokenizer, and return its folder."""

    def write(name, layers=UNEQUAL, *, tokenizer=tokenizer, folder="model", scale=0.2, **changes):
        torch.manual_seed(0)
        config = CONFIGS[name]()
        changes = {"vocab_size": len(tokenizer) + 11} | changes
        config = config_with_layers(type(config).from_dict(config.to_dict() | changes), layers)
        model = build_model(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * scale + (parameter.dim() == 1))
        save_model(model, tmp_path / folder, companions=None, provenance={})
        tokenizer.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return write


def export(checkpoint, **options):
    """Export beside the checkpoint, and return what it says and the file's reader."""
    exported = export_gguf(checkpoint, checkpoint.with_suffix(".gguf"), **options)
    return exported, gguf.GGUFReader(exported.path)


def value(reader, key):
    return reader.get_field(key).contents()


def weights(reader):
    return {tensor.name: tensor for tensor in reader.tensors}


CASES = {
    "llama": ("llama", UNEQUAL, {}, "deci"),
    "llama-tied": ("llama-tied", UNEQUAL, {}, "deci"),
    "llama-biased": ("llama-biased", UNEQUAL, {}, "deci"),
    "llama-output-biases": ("llama-output-biases", UNEQUAL, {}, "deci"),
    "llama3-rope": ("llama", UNEQUAL, {"rope_parameters": LLAMA3}, "deci"),
    "llama-linear-rope": ("llama", UNEQUAL, {"rope_parameters": LINEAR}, "deci"),
    "llama-yarn": ("llama", UNEQUAL, {"rope_parameters": YARN}, "deci"),
    "mistral": ("mistral", UNEQUAL, {"sliding_window": None}, "deci"),
    "qwen2": ("qwen2", UNEQUAL, {}, "deci"),
    "qwen2-tied": ("qwen2-tied", UNEQUAL, {}, "deci"),
    "qwen2-output-biases": ("qwen2", UNEQUAL, {"output_biases": True}, "deci"),
    "qwen2-yarn": ("qwen2", UNEQUAL, {"rope_parameters": YARN}, "deci"),
    "qwen3-tied": ("qwen3", UNEQUAL, QWEN3 | {"tie_word_embeddings": True}, "openelm"),
    "qwen3-tied-yarn": (
        "qwen3",
        UNEQUAL,
        QWEN3 | {"tie_word_embeddings": True, "rope_parameters": YARN},
        "openelm",
    ),
    "equal-llama": ("llama", EQUAL, {}, "llama"),
    "equal-llama-output-biases": ("llama-output-biases", EQUAL, {}, "llama"),
    "equal-llama-biased": ("llama-biased", EQUAL, {"rope_parameters": LLAMA3}, "llama"),
    "equal-mistral": ("mistral", EQUAL, {"sliding_window": 4096}, "llama"),
    "equal-qwen2": ("qwen2", EQUAL, {"hidden_size": 60, "rope_parameters": YARN}, "qwen2"),
    "equal-qwen2-of-narrow-heads": ("qwen2", EQUAL, {}, "deci"),
    "equal-qwen3": ("qwen3", EQUAL, QWEN3, "qwen3"),
    "equal-qwen3-tied": ("qwen3", EQUAL, QWEN3 | {"tie_word_embeddings": True}, "qwen3"),
}


def log_probabilities(path, checkpoint, *, num_tokens):
    """Let llama.cpp decode some tokens; return (tokens, V) log-probabilities, its own and PyTorch's."""
    model = load_model(checkpoint)
    size, prompt = model.config.vocab_size, random_tokens(rows=1, length=40)[0].tolist()
    llama = LlamaCpp(path)
    parts = [i for i in range(size) if not llama.detokenize([i]).isascii()] + [0, 1, 2]
    _, tokens, found = llama.generate(prompt, num_tokens, num_probs=size, banned=parts)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    allowed = expected.clone()
    allowed[:, parts] = -torch.inf
    return torch.tensor([[at[i] for i in range(size)] for at in found]), expected, tokens, allowed.argmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_same_probabilities_as_pytorch(make, case):
    name, layers, changes, architecture = CASES[case]
    checkpoint = make(name, layers, **changes)
    exported, reader = export(checkpoint, dtype="f32")
    assert value(reader, "general.architecture") == architecture
    assert exported.params == load_model(checkpoint).num_parameters()
    assert exported.size_bytes == exported.path.stat().st_size
    # The first token comes of the prompt's pass, the others of passes of one token each.
    found, expected, tokens, best = log_probabilities(exported.path, checkpoint, num_tokens=6)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    assert tokens == best.tolist()


def test_a_file_holds_the_checkpoint_bit_for_bit(make):
    checkpoint = make("llama-biased")
    config = load_config(checkpoint)
    found = {
        name: t.data.reshape(t.shape[::-1]) for name, t in weights(export(checkpoint, dtype="f32")[1]).items()
    }
    rows = {}
    for index, layer in enumerate(layer_shapes(config)):
        for name, heads in (("q", layer.query_heads), ("k", layer.kv_heads)):
            # Where each row goes: dimensions i and i + 5 of a head of 10 end up side by side.
            order = [
                head * 10 + half * 5 + pair for head in range(heads) for pair in range(5) for half in (0, 1)
            ]
            rows |= {
                f"model.layers.{index}.self_attn.{name}_proj.{kind}": order for kind in ("weight", "bias")
            }
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    ours = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    with CheckpointReader(checkpoint) as reader:
        assert len(found) == len(reader.names())
        for name in reader.names():
            *_, module, kind = name.split(".")
            block = name.removeprefix("model.layers.").split(".")[0]
            prefix = "attn" if module[0] in "qkv" else "ffn"
            there = ours.get(module) or f"{prefix}_{module.removesuffix('_proj')}"
            data = found[names.get(name) or f"blk.{block}.{there}.{kind}"]
            expected = reader.tensor(name).numpy()
            np.testing.assert_array_equal(data, expected[rows[name]] if name in rows else expected)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_rounds_to_the_nearest_and_keeps_vectors(make, dtype):
    checkpoint = make("qwen2")
    _, reader = export(checkpoint, dtype=dtype)
    tensors, kind = weights(reader), {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert value(reader, "general.file_type") == {"f16": 1, "bf16": 32}[dtype]
    with CheckpointReader(checkpoint) as source:
        expected = source.tensor("model.layers.1.mlp.down_proj.weight").to(kind).view(torch.int16).numpy()
        found = tensors["blk.1.ffn_down.weight"]
        assert found.tensor_type.name.lower() == dtype
        np.testing.assert_array_equal(
            np.ascontiguousarray(found.data).view(np.int16).reshape(48, 40), expected
        )
        bias = source.tensor("model.layers.1.self_attn.v_proj.bias").numpy()
        np.testing.assert_array_equal(tensors["blk.1.attn_v.bias"].data, bias)


def test_a_checkpoint_in_bfloat16_is_written_as_it_is(make, tmp_path):
    model = load_model(make("llama"), dtype=torch.bfloat16)
    save_model(model, tmp_path / "half", companions=tmp_path / "model", provenance={})
    tensors = weights(export(tmp_path / "half", dtype="f32")[1])
    expected = model.model.layers[2].mlp.up_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(tensors["blk.2.ffn_up.weight"].data, expected)


def test_q8_0_is_that_of_the_gguf_package_bit_for_bit():
    rows = torch.randn(700, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    rows[3] = 0
    # Steps of 1 and weights on and just beside their halves, where rounding could go either way.
    halves = torch.arange(512) % 127 + 0.5
    rows[4] = halves * torch.tensor([1, -1]).repeat(256)
    rows[5], rows[6] = rows[4].nextafter(torch.zeros(512)), rows[4] * 1.0000001
    rows[4:7, ::32] = 127
    rows[7, 0] = 1e-42
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(quantized_q8_0(rows), expected.reshape(-1))
    in_bfloat16 = gguf.quants.quantize(rows.bfloat16().float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(quantized_q8_0(rows.bfloat16()), in_bfloat16.reshape(-1))


def test_q8_0_leaves_rows_that_blocks_do_not_divide_in_float16(make):
    layers = (
        LayerShape(query_heads=4, kv_heads=2, mlp_width=96),
        LayerShape(query_heads=8, kv_heads=4, mlp_width=41),
    )
    sizes = dict(
        hidden_size=64, head_dim=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    checkpoint = make("llama-tied", layers, **sizes)
    exported, reader = export(checkpoint, dtype="q8_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in weights(reader).items()}
    assert {name for name, kind in kinds.items() if kind == "F16"} == {"blk.1.ffn_down.weight"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert set(kinds.values()) == {"F32", "F16", "Q8_0"}
    assert "1 of" in exported.notes[0]
    assert "float16" in exported.notes[0]
    found, expected, _, _ = log_probabilities(exported.path, checkpoint, num_tokens=1)
    assert (found - expected).abs().mean() < 0.05


def test_a_value_beyond_float16_is_named(make, tmp_path):
    checkpoint = make("llama")
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 70_000
    save_model(model, tmp_path / "large", companions=checkpoint, provenance={})
    with pytest.raises(
        ExportError, match=r"layers\.1\.mlp\.up_proj\.weight holds values beyond float16.*bf16"
    ):
        export_gguf(tmp_path / "large", tmp_path / "large.gguf")
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*partial"))
    export_gguf(tmp_path / "large", tmp_path / "large.gguf", dtype="bf16")


def test_the_description_tells_what_the_model_is(make, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    checkpoint = make("llama")
    provenance = {
        "base": "org/Tiny-Chat",
        "revision": "abc123",
        "phase": 3,
        "license": "mit",
        "language": ["en"],
    }
    (checkpoint / "adapt_pruner.json").write_text(json.dumps(provenance))
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\ntags: [pruned]\n---\n# Tiny\n")
    exported, reader = export(checkpoint)
    size = f"{exported.params / 1000:.0f}K"
    found = {key: value(reader, key) for key in reader.fields if not key.startswith("GGUF.")}
    described = {
        "general.name": f"Tiny-Chat pruned to {size}",
        "general.size_label": size,
        "general.license": "apache-2.0",  # the card's, which may have been corrected
        "general.languages": ["en"],
        "general.base_model.0.name": "Tiny-Chat",
        "general.base_model.0.version": "abc123",
        "general.file_type": 1,
        "deci.attention.head_count": [6, 4, 5],
        "deci.attention.head_count_kv": [3, 2, 1],
        "deci.feed_forward_length": [31, 40, 7],
        "deci.attention.key_length": 10,
        "deci.attention.value_length": 10,
        "deci.rope.dimension_count": 10,
        "deci.context_length": 64,
        "deci.vocab_size": 411,
        "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in described} == described
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == [3, 3, 3, 1]
    assert types[-11:] == [5] * 11


@pytest.mark.parametrize(
    ("name", "layers", "changes", "problem"),
    [
        ("qwen3", UNEQUAL, QWEN3, "not tied.*openelm.*no output head.*tied embeddings"),
        ("qwen3", EQUAL, QWEN3 | {"attention_bias": True}, r"qwen3 does not read .*bias"),
        ("qwen3", EQUAL, {"tie_word_embeddings": True}, "sliding_window=5 is shorter than the context of 64"),
        ("mistral", UNEQUAL, {}, "sliding_window=5 is shorter than the context of 64"),
        ("gemma2", UNEQUAL, {}, "gemma2 whose layers differ.*no llama.cpp architecture"),
        ("phi3", UNEQUAL, {}, "phi3 whose layers differ"),
        ("smollm3", EQUAL, {}, "smollm3.*convert_hf_to_gguf.py"),
        ("granite", EQUAL, {}, "granite.*convert_hf_to_gguf.py"),
        ("olmo2", EQUAL, {}, "olmo2.*convert_hf_to_gguf.py"),
        ("llama", UNEQUAL, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", UNEQUAL, {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
        ("llama", EQUAL, {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.8}}, "rotates whole heads"),
        ("llama", UNEQUAL, {"rope_parameters": YARN | {"beta_fast": 16}}, "'yarn' with beta_fast"),
        ("llama", UNEQUAL, {"rope_parameters": YARN | {"attention_factor": 1.0}}, "with attention_factor"),
        ("llama", UNEQUAL, {"rope_parameters": YARN | {"truncate": False}}, "with truncate=false"),
        ("qwen2", EQUAL, {"hidden_size": 60, "rope_parameters": LLAMA3}, "qwen2 does not read it"),
        ("llama", UNEQUAL, {"vocab_size": 399}, "a token 399, but the embedding only 399 rows"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_reason(
    make, tmp_path, name, layers, changes, problem
):
    checkpoint = make(name, layers, **changes)
    with pytest.raises(ExportError, match=problem):
        export_gguf(checkpoint, tmp_path / "refused.gguf")
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("size", ["intermediate_size", "num_attention_heads", "num_key_value_heads"])
def test_an_empty_layer_is_refused(make, tmp_path, size):
    checkpoint = make("llama")
    config = json.loads((checkpoint / "config.json").read_text())
    config["per_layer_config"]["0"][size] = 0
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        AdaptPrunerError, match=r"layer 0 has no attention heads or no MLP channels|cannot be read"
    ):
        export_gguf(checkpoint, tmp_path / "refused.gguf")


def test_a_checkpoint_that_lacks_tensors_or_has_others_is_refused(make, tmp_path):
    from safetensors.torch import save_file

    model = load_model(make("llama"))
    state = model.state_dict()
    for name, change, problem in (
        ("lacks", {"model.norm.weight": None}, r"lacks model\.norm\.weight"),
        ("more", {"model.layers.0.mlp.scale": torch.ones(3)}, r"does not read model\.layers\.0\.mlp\.scale"),
        ("other", {"model.norm.weight": torch.ones(47)}, r"model\.norm\.weight is \(47,\).*says \(48,\)"),
        ("heads", {"model.layers.0.self_attn.k_proj.weight": torch.ones(20, 48)}, r"k_proj.*says \(30, 48\)"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in (tmp_path / "model").glob("*.json"):
            if not file.name.startswith("model"):
                (folder / file.name).write_bytes(file.read_bytes())
        changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ExportError, match=problem):
            export_gguf(folder, tmp_path / f"{name}.gguf")
        assert not (tmp_path / f"{name}.gguf").exists()


def test_a_checkpoint_without_tokenizer_or_a_taken_name_is_refused(make, tmp_path):
    checkpoint = make("llama")
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_gguf(checkpoint, tmp_path / "taken.gguf")
    with pytest.raises(ExportError, match="dtype='q4_0' is none of"):
        export_gguf(checkpoint, tmp_path / "other.gguf", dtype="q4_0")
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        export_gguf(checkpoint, tmp_path / "other.gguf")


def test_a_window_as_long_as_the_context_is_none():
    config = CONFIGS["mistral"]()
    config.sliding_window = config.max_position_embeddings
    assert [architecture_of(config, layers) for layers in (EQUAL, UNEQUAL)] == ["llama", "deci"]


def shapes(*widths, heads=4):
    return [LayerShape(query_heads=heads, kv_heads=1, mlp_width=width) for width in widths]


def test_notes_say_which_quantizations_the_widths_rule_out():
    sizes = dict(hidden_size=512, head_dim=64)
    assert quantization_notes(shapes(512, 768), **sizes) == ()
    [odd] = quantization_notes(shapes(512, 700, 701, 702, 256, 7, 9), **sizes)
    assert "ffn_down of layers 1-3, 5-6 " in odd
    assert "prune.width_multiple=32" in odd
    [coarse] = quantization_notes(shapes(512, 704), **sizes)
    assert "ffn_down of layers 1 " in coarse
    assert "multiple of 256 (such as 704)" in coarse
    assert "prune.width_multiple=256" in coarse
    [heads] = quantization_notes(shapes(512, heads=3), **sizes)
    assert "attn_output of layers 0 has rows that are not a multiple of 256 (such as 192)" in heads
    [hidden] = quantization_notes(shapes(704), hidden_size=576, head_dim=64)
    assert "hidden size 576" in hidden
    [none] = quantization_notes(shapes(704), hidden_size=48, head_dim=64)
    assert "No quantization fits" in none
