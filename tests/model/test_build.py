import copy
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
    T5Config,
)
from transformers.masking_utils import create_causal_mask  # noqa: F401 (fails here if transformers moves it)

from core.errors import CheckpointError, UnsupportedModelError
from core.model.build import build_model, load_model, load_tokenizer, model_shape
from core.model.checkpoint import save_model
from core.model.config import config_with_layers, head_dim, layer_shapes, load_config
from core.model.families import FAMILIES, family_of
from core.model.shape import LayerShape
from tests.support.models import CONFIGS, SIZES, UNEQUAL, Float64Throughout, random_tokens, tiny


def test_every_family_is_tried():
    assert {CONFIGS[name]().model_type for name in CONFIGS} == FAMILIES.keys()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", [None, UNEQUAL], ids=["equal", "unequal"])
def test_params_from_sizes_equal_the_built_models(name, layers):
    model = tiny(name, layers)
    assert model_shape(model.config).num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_has_the_size_its_config_says(name):
    model = tiny(name, UNEQUAL)
    family, head = family_of(model.config), head_dim(model.config)
    assert layer_shapes(model.config) == UNEQUAL
    for layer, shape in zip(model.model.layers, UNEQUAL, strict=True):
        lengths = dict(query=shape.query_heads * head, kv=shape.kv_heads * head, mlp=shape.mlp_width)
        assert layer.self_attn.num_key_value_groups == shape.heads_per_group
        cut = {n: p for n, p in layer.named_parameters() if n in family.slicings}
        assert {n for n in family.slicings if n.endswith("weight")} <= cut.keys()
        for weight_name, weight in cut.items():
            slicing = family.slicings[weight_name]
            assert weight.shape[slicing.axis] == sum(lengths[kind] for kind in slicing.kinds), weight_name


@pytest.mark.parametrize("name", CONFIGS)
def test_config_of_unequal_layers_survives_a_round_trip(name, tmp_path):
    config = config_with_layers(CONFIGS[name](), UNEQUAL)
    config.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), load_config(tmp_path)):
        assert layer_shapes(loaded) == UNEQUAL
        assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("heads", [4, 5])  # a divisor of the hidden size and none
@pytest.mark.parametrize("name", CONFIGS)
def test_fewer_heads_in_all_layers_survive_a_round_trip(name, heads, tmp_path):
    layers = (LayerShape(query_heads=heads, kv_heads=1, mlp_width=9),) * 3
    config = config_with_layers(CONFIGS[name](), layers)
    config.save_pretrained(tmp_path)
    assert layer_shapes(load_config(tmp_path)) == layers
    assert head_dim(load_config(tmp_path)) == head_dim(CONFIGS[name]())


def test_head_counts_that_llama_refuses_globally_still_load(tmp_path):
    # 48 is not a multiple of 5: transformers' own check would refuse a plain config.
    config = config_with_layers(CONFIGS["llama"](), (LayerShape(query_heads=5, kv_heads=5, mlp_width=9),) * 3)
    config.save_pretrained(tmp_path)
    assert layer_shapes(AutoConfig.from_pretrained(tmp_path))[2].query_heads == 5


@pytest.mark.parametrize("config", [Phi3Config, Qwen2Config, SmolLM3Config], ids=lambda c: c.model_type)
def test_a_head_keeps_its_size_where_it_followed_from_their_number(config, tmp_path):
    config = config(**{name: size for name, size in SIZES.items() if name != "head_dim"})
    for layers in (UNEQUAL, (LayerShape(query_heads=4, kv_heads=2, mlp_width=9),) * 3):
        config_with_layers(config, layers).save_pretrained(tmp_path)
        assert head_dim(load_config(tmp_path)) == 8
        assert build_model(load_config(tmp_path)).model.layers[1].self_attn.head_dim == 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_layer_follows_the_models_way_of_attention(attention):
    model = tiny("llama", UNEQUAL)
    model.set_attn_implementation(attention)
    for layer, shape in zip(copy.deepcopy(model).model.layers, UNEQUAL, strict=True):
        assert layer.self_attn.config._attn_implementation == attention
        assert layer.self_attn.config.num_attention_heads == shape.query_heads


def logits_token_by_token(model, tokens):
    output, steps = None, []
    for position in range(tokens.shape[1]):
        past = {} if output is None else {"past_key_values": output.past_key_values}
        output = model(tokens[:, position : position + 1], use_cache=True, **past)
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("layers", [None, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward_in_both_ways_of_attention(name, layers):
    model, tokens = tiny(name, layers), random_tokens()
    with torch.no_grad(), Float64Throughout():
        model.set_attn_implementation("eager")
        full = model(tokens, use_cache=False).logits
        found = [logits_token_by_token(model, tokens)]
        if model._supports_sdpa:  # Gemma 2's soft caps are beyond it
            model.set_attn_implementation("sdpa")
            found += [model(tokens, use_cache=False).logits, logits_token_by_token(model, tokens)]
    for logits in found:
        torch.testing.assert_close(logits, full, rtol=0, atol=1e-10)


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


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_keeps_every_bit(name, tmp_path):
    model, tokens = tiny(name, UNEQUAL, dtype=torch.bfloat16), random_tokens()
    save_model(model, tmp_path, companions=None, provenance={})
    loaded = load_model(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


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


SUPPORTED = (
    r"supported: gemma2, gemma3_text, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3\. "
    r"Choose a base model of one of these\.$"
)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (GPT2Config, r"'gpt2' is not supported"),
        (MixtralConfig, r"'mixtral' is a mixture of experts \(num_local_experts\)"),
        (lambda: LlamaConfig(**SIZES, num_experts=4), r"'llama' is a mixture of experts \(num_experts\)"),
        (DeepseekV3Config, r"'deepseek_v3' is a mixture of experts"),
        (MambaConfig, r"'mamba' is a state-space model \(state_size\)"),
        (T5Config, r"'t5' is an encoder-decoder"),
        (
            Gemma3Config,
            r"'gemma3' is multimodal: only a checkpoint of the language model alone could be read",
        ),
        (
            lambda: Gemma3TextConfig(**SIZES, use_bidirectional_attention=True),
            r"'gemma3_text' attends in both directions",
        ),
    ],
)
def test_an_unsupported_family_is_refused_with_the_supported_ones(config, what, tmp_path):
    with pytest.raises(UnsupportedModelError, match=f"^model family {what}.*; {SUPPORTED}"):
        build_model(config())
    config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"^model family {what}.*; {SUPPORTED}"):
        load_config(tmp_path)


def test_a_family_that_transformers_does_not_know_is_refused_without_its_code(tmp_path):
    code = {"AutoConfig": "configuration_own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    with pytest.raises(UnsupportedModelError, match=rf"'own' is not supported; {SUPPORTED}"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_config_that_cannot_be_read_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: "):
        load_config(tmp_path)


def as_mobilellm(directory, **changes):
    """Describe the Llama in the folder as Meta's MobileLLMs are described: their own type, code, ties."""
    config = json.loads((directory / "config.json").read_text())
    tied = config.pop("tie_word_embeddings")
    rope_theta = config.pop("rope_parameters")["rope_theta"]
    config |= dict(
        model_type="mobilellm",
        architectures=["MobileLLMForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
            "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
        },
        rope_theta=rope_theta,
        rope_scaling=None,
        share_embedding=tied,
        layer_sharing=False,
        tie_word_embeddings=False,
    )
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_mobilellm_is_read_as_llama(name, tmp_path):
    model, tokens = tiny(name), random_tokens()
    save_model(model, tmp_path, companions=None, provenance={})
    as_mobilellm(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert model_shape(load_config(tmp_path)) == model_shape(model.config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    save_model(loaded, tmp_path / "again", companions=None, provenance={})
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert written["tie_word_embeddings"] == (name == "llama-tied")
    assert not {"auto_map", "share_embedding", "layer_sharing"} & written.keys()


def test_the_smallest_published_mobilellm_has_the_published_number_of_parameters(tmp_path):
    sizes = dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, head_dim=64
    )
    LlamaConfig(**sizes, num_key_value_heads=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    as_mobilellm(tmp_path)
    assert model_shape(load_config(tmp_path)).num_params() == 124_635_456


def test_a_mobilellms_tokenizer_is_read_without_its_code(tmp_path, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    tiny("llama").config.save_pretrained(tmp_path)
    as_mobilellm(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run the model's code"))
    text = "What is the capital of France?"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_sentencepiece_model_alone_names_the_package_that_reads_it(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    as_mobilellm(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="is read by the package sentencepiece: install it"):
        load_tokenizer(tmp_path)


def test_a_mobilellm_that_shares_layers_is_refused(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    as_mobilellm(tmp_path, layer_sharing=True)
    with pytest.raises(UnsupportedModelError, match=r"layer_sharing=true runs each layer twice"):
        load_config(tmp_path)


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
