import json

import pytest
import torch
from transformers import AutoConfig, GPT2Config
from transformers.masking_utils import create_causal_mask  # noqa: F401 (fails here if transformers moves it)

from core.errors import CheckpointError, UnsupportedModelError
from core.model.build import (
    build_model,
    config_with_layers,
    layer_shapes,
    load_config,
    load_model,
    model_shape,
)
from core.model.checkpoint import save_model
from core.model.shape import LayerShape
from tests.models import CONFIGS, UNEQUAL, random_tokens, tiny


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", [None, UNEQUAL], ids=["equal", "unequal"])
def test_params_from_sizes_equal_the_built_models(name, layers):
    model = tiny(name, layers)
    assert model_shape(model.config).num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_has_the_size_its_config_says(name):
    model = tiny(name, UNEQUAL)
    assert layer_shapes(model.config) == UNEQUAL
    for layer, shape in zip(model.model.layers, UNEQUAL, strict=True):
        assert layer.self_attn.q_proj.out_features == shape.query_heads * 10
        assert layer.self_attn.k_proj.out_features == shape.kv_heads * 10
        assert layer.self_attn.num_key_value_groups == shape.heads_per_group
        assert layer.mlp.down_proj.in_features == shape.mlp_width


def test_config_of_unequal_layers_survives_a_round_trip(tmp_path):
    config = config_with_layers(CONFIGS["llama"](), UNEQUAL)
    config.save_pretrained(tmp_path)
    assert layer_shapes(AutoConfig.from_pretrained(tmp_path)) == UNEQUAL


def test_config_of_equal_layers_is_plain(tmp_path):
    config = config_with_layers(
        tiny("llama", UNEQUAL).config, (LayerShape(query_heads=4, kv_heads=2, mlp_width=9),) * 3
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" not in written
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["intermediate_size"]) == (
        4,
        2,
        9,
    )


def test_head_counts_that_llama_refuses_globally_still_load(tmp_path):
    # 48 is no multiple of 5: transformers' own check would refuse a plain config.
    config = config_with_layers(CONFIGS["llama"](), (LayerShape(query_heads=5, kv_heads=5, mlp_width=9),) * 3)
    config.save_pretrained(tmp_path)
    assert layer_shapes(AutoConfig.from_pretrained(tmp_path))[2].query_heads == 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward(name, attention):
    model = tiny(name, UNEQUAL)
    model.set_attn_implementation(attention)
    tokens = random_tokens()
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        output, steps = None, []
        for position in range(tokens.shape[1]):
            past = {} if output is None else {"past_key_values": output.past_key_values}
            output = model(tokens[:, position : position + 1], use_cache=True, **past)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-10)


def test_attention_is_causal_in_every_layer():
    model = tiny("llama", UNEQUAL)
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 101
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits[:, :-1], model(changed).logits[:, :-1])


def test_generation_is_greedy_decoding_by_hand():
    model = tiny("llama", UNEQUAL)
    prompt = random_tokens(rows=1, length=5)
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    model.generation_config.eos_token_id = None
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert generated.tolist() == expected.tolist()


def test_loading_keeps_every_bit(tmp_path):
    for name in CONFIGS:
        model = tiny(name, UNEQUAL, dtype=torch.bfloat16)
        save_model(model, tmp_path / name, companions=None, provenance={})
        loaded = load_model(tmp_path / name)
        assert loaded.dtype == torch.bfloat16
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key


def test_tied_weights_are_one_tensor_after_loading(tmp_path):
    save_model(tiny("llama-tied"), tmp_path, companions=None, provenance={})
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_training_a_loaded_model_does_not_change_its_file(tmp_path):
    save_model(tiny("llama"), tmp_path, companions=None, provenance={})
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    with torch.no_grad():
        for parameter in load_model(tmp_path).parameters():
            parameter.zero_()
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}


def test_an_unsupported_family_is_refused_with_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported: llama, qwen2"):
        build_model(GPT2Config())


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_config(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    save_model(tiny("llama", UNEQUAL), tmp_path, companions=None, provenance={})
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"]["2"]["intermediate_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"do not fit config\.json"):
        load_model(tmp_path)
