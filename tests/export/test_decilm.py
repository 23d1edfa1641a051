import copy
import json
import logging
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from core.errors import ExportError, TargetError, UnsupportedModelError
from core.export.decilm import export_decilm, ffn_mult
from core.model.build import build_model, load_model
from core.model.checkpoint import CheckpointReader, save_model
from core.model.config import config_with_layers, layer_shapes, load_config
from core.model.shape import LayerShape
from core.runs.run import Run
from core.storage.publication import open_publication
from tests.support.models import CONFIGS, LLAMA3, SIZES, random_tokens
from tests.support.project import recipe_with, resolve, rewrite_base, run_all

WIDE = SIZES | {"head_dim": 8, "intermediate_size": 1024}
"""Sizes of a base model for the portable profile: 6 heads of 8 dimensions make its 48."""
LAYERS = tuple(LayerShape(query_heads=6, kv_heads=3, mlp_width=width) for width in (256, 1024, 512))


def write(folder, layers=LAYERS, *, config=LlamaConfig, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    small = config_with_layers(config(**WIDE | {"tie_word_embeddings": False} | changes), layers)
    model = build_model(small, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    save_model(model, folder, companions=None, provenance={"base": "random"})
    return model


@pytest.fixture
def read_with_code(tmp_path, monkeypatch):
    """Read a config as vLLM and SGLang do: through transformers, by the code beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=True)


def width_in_a_runtime(mult, hidden_size, decimals=None):
    """What a runtime makes of ``ffn_mult``; MLX rounds it to 6 decimals first."""
    mult = mult if decimals is None else round(mult, decimals)
    return math.ceil(int(2 * mult * hidden_size / 3) / 256) * 256


@pytest.mark.parametrize("decimals", [None, 6], ids=["as it is", "rounded by MLX"])
def test_every_width_that_is_a_multiple_of_256_comes_back_from_the_formula(decimals):
    for hidden in [*range(48, 1024, 16), *range(1024, 20480, 64)]:
        for width in (256, 512, 1536, 11008, 14336, 28672, 53248):
            mult = json.loads(json.dumps(ffn_mult(width, hidden)))
            assert width_in_a_runtime(mult, hidden, decimals) == width


def test_the_config_says_what_the_runtimes_read(tmp_path, read_with_code):
    write(tmp_path / "pruned")
    export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    written = json.loads((tmp_path / "decilm" / "config.json").read_text())
    assert not written.keys() & {"per_layer_config", "allow_global_per_layer_attribute_access"}
    # MLX takes its own defaults for what is not there.
    assert {"rms_norm_eps", "vocab_size", "max_position_embeddings", "hidden_act"} <= written.keys()
    assert (written["rope_theta"], written["rope_scaling"]) == (10000.0, None)
    config = read_with_code(tmp_path / "decilm")
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert (config.num_attention_heads, config.head_dim, config.num_hidden_layers) == (6, 8, 3)
    assert config.rope_parameters["rope_theta"] == 10000.0
    for block, layer in zip(config.block_configs, LAYERS, strict=True):
        for part in (block.attention, block.ffn):
            assert part.no_op is False
            assert part.replace_with_linear is False
        assert config.num_attention_heads // block.attention.n_heads_in_group == layer.kv_heads
        assert width_in_a_runtime(block.ffn.ffn_mult, config.hidden_size) == layer.mlp_width
        assert not hasattr(block.ffn, "hidden_act")  # vLLM asks, and would take it


def test_the_config_can_be_copied_sent_to_another_process_and_written(tmp_path, read_with_code):
    write(tmp_path / "pruned", rope_parameters=LLAMA3)
    export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    config = read_with_code(tmp_path / "decilm")
    config.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "decilm" / "configuration_decilm.py", tmp_path / "again")
    sent = pickle.loads(pickle.dumps(config))
    for other in (copy.deepcopy(config), sent, read_with_code(tmp_path / "again")):
        assert [block.ffn.ffn_mult for block in other.block_configs] == [8.0, 32.0, 16.0]
        assert other.block_configs[1].attention.n_heads_in_group == 2
        assert other.rope_parameters == config.rope_parameters
    assert config.rope_parameters == load_config(tmp_path / "pruned").rope_parameters


def test_scaled_rotary_frequencies_stand_in_both_spellings(tmp_path):
    write(tmp_path / "pruned", rope_parameters=LLAMA3)
    export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    written = json.loads((tmp_path / "decilm" / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert written["rope_parameters"] == LLAMA3


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_the_checkpoints_bit_by_bit(tmp_path, tied, tokenizer):
    model = write(tmp_path / "pruned", dtype=torch.bfloat16, tie_word_embeddings=tied)
    tokenizer.save_pretrained(tmp_path / "pruned")
    exported = export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    with CheckpointReader(tmp_path / "pruned") as before, CheckpointReader(tmp_path / "decilm") as after:
        assert sorted(before.names()) == sorted(after.names())
        assert ("lm_head.weight" in after.names()) is not tied
        for name in before.names():
            assert after.tensor(name).dtype == torch.bfloat16
            assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert exported.params == sum(parameter.numel() for parameter in model.parameters())
    assert exported.size_bytes == sum(path.stat().st_size for path in exported.path.iterdir())
    same = ("tokenizer.json", "tokenizer_config.json", "adapt_pruner.json")
    for name in same:
        assert json.loads((tmp_path / "decilm" / name).read_text()) == json.loads(
            (tmp_path / "pruned" / name).read_text()
        )


def test_layers_that_differ_in_kv_heads_are_exported_with_a_warning_for_sglang(tmp_path):
    layers = (LAYERS[0], LayerShape(query_heads=6, kv_heads=1, mlp_width=512), LAYERS[2])
    write(tmp_path / "pruned", layers)
    exported = export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    assert any("SGLang refuses" in note for note in exported.notes)
    blocks = json.loads((tmp_path / "decilm" / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [2, 6, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(layers=(*LAYERS[:2], LayerShape(query_heads=6, kv_heads=3, mlp_width=500))), "width of 500"),
        (
            dict(layers=(*LAYERS[:2], LayerShape(query_heads=4, kv_heads=2, mlp_width=512))),
            "4, 6 query heads",
        ),
        (dict(layers=(LayerShape(query_heads=4, kv_heads=2, mlp_width=512),) * 3), "4 query heads of 8"),
        (dict(attention_bias=True), "biases (attention_bias)"),
        (dict(mlp_bias=True), "biases (mlp_bias)"),
        (dict(hidden_act="gelu"), "activation is gelu"),
        (dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "scaling is dynamic"),
        (dict(config=type(CONFIGS["qwen2"]())), "its family is qwen2"),
    ],
)
def test_what_the_format_does_not_hold_is_refused_with_the_reason_and_what_to_do(tmp_path, changes, reason):
    write(tmp_path / "pruned", **changes)
    with pytest.raises(ExportError) as raised:
        export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    assert reason in str(raised.value)
    assert "export another format" in str(raised.value).lower()
    # Pruning otherwise helps where sizes alone are in the way.
    assert ("prune.profile=portable" in str(raised.value)) == ("layers" in changes)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.fixture
def portable(project, tmp_path, monkeypatch):
    """The tiny project with a base model of the portable profile, as the working directory."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    vocabulary = load_config(tmp_path / "project" / "base").vocab_size
    for path in (tmp_path / "project" / "base").glob("model*"):
        path.unlink()
    write(tmp_path / "project" / "base", (LAYERS[1],) * 3, vocab_size=vocabulary)
    return lambda **changes: recipe_with(
        {"prune.profile": "portable", "prune.width_multiple": 256, "prune.amplitude": 0.05}
        | {f"prune.{name}": value for name, value in changes.items()}
    )


def test_a_portable_run_ends_in_a_model_that_is_exported(portable, tmp_path):
    handle, final = run_all(portable(target="70%"), tmp_path / "artifacts")
    run, folder = Run.load(handle), open_publication(final).fetch(tmp_path / "final")
    shapes = layer_shapes(load_config(folder))
    assert {(layer.query_heads, layer.kv_heads) for layer in shapes} == {(6, 3)}
    assert all(layer.mlp_width % 256 == 0 for layer in shapes)
    exported = export_decilm(folder, tmp_path / "decilm")
    step = 256 * run.dense.mlp_channel_params
    assert exported.params < run.dense.num_params()
    miss = exported.params - run.phase_params[-1]
    assert 0 < abs(miss) <= step / 2
    told = f"{exported.params:,}, {100 * (1 - exported.params / run.dense.num_params()):.1f} % removed"
    assert (
        f"{told}; {abs(miss):,} {'above' if miss > 0 else 'below'} target"
        in (folder / "report.html").read_text()
    )


def test_the_size_that_widths_of_256_reach_is_told_at_the_start(portable, caplog):
    with caplog.at_level(logging.INFO):
        handle, _ = resolve(portable(target="70%"))
    dense = Run.load(handle).dense
    step, target = 256 * 3 * 48, round(dense.num_params() * 0.7)
    sizes = [dense.num_params() - count * step for count in range(12)]
    nearest = min(sizes, key=lambda size: abs(size - target))
    assert f"the nearest size to the target is {nearest:,} parameters" in caplog.text
    with pytest.raises(TargetError, match=f"multiples of 256 change it by {step:,} at a time"):
        resolve(portable(target="99%"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(intermediate_size=1000), "layer 0 has an MLP width of 1,000, not a multiple of 256"),
        (dict(attention_bias=True), "its projections have biases"),
        (dict(head_dim=10), "6 query heads of 10 dimensions make 60"),
    ],
)
def test_a_base_model_that_the_format_does_not_hold_is_refused_before_anything_is_computed(
    portable, changes, reason
):
    rewrite_base(Path("base"), changes)
    with pytest.raises(UnsupportedModelError) as raised:
        resolve(portable())
    assert str(raised.value).startswith(
        "prune.profile=portable needs a base model that the DeciLM format holds"
    )
    assert reason in str(raised.value)
    assert str(raised.value).endswith("Set prune.profile to free, or choose another base model.")


@pytest.fixture(scope="module")
def mlx_python(tmp_path_factory):
    """An interpreter of its own with MLX for the CPU, fetched from the package index."""
    folder = tmp_path_factory.mktemp("mlx")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    fetched = subprocess.run(
        [python, "-m", "pip", "install", "-q", "mlx[cpu]", "mlx-lm"], capture_output=True
    )
    if fetched.returncode:
        pytest.skip("MLX for the CPU cannot be fetched here")
    return python


MLX_LOGITS = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
mx.save_safetensors(sys.argv[3], {"logits": model(mx.load(sys.argv[2])["tokens"])})
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, rope_parameters=LLAMA3)])
def test_mlx_computes_the_same_from_the_exported_model(tmp_path, mlx_python, changes):
    write(tmp_path / "pruned", **changes)
    export_decilm(tmp_path / "pruned", tmp_path / "decilm")
    tokens = random_tokens(rows=2, length=50)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    files = [tmp_path / name for name in ("decilm", "tokens.safetensors", "logits.safetensors")]
    subprocess.run([mlx_python, "-c", MLX_LOGITS, *files], check=True)
    with torch.no_grad():
        expected = load_model(tmp_path / "pruned")(tokens).logits
    torch.testing.assert_close(load_file(files[2])["logits"], expected, rtol=0, atol=1e-4)
