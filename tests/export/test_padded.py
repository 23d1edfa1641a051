import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from core.errors import ExportError
from core.export.padded import export_padded
from core.model.build import build_model, load_model
from core.model.checkpoint import CheckpointReader, save_model
from core.model.config import config_with_layers, head_dim
from core.model.families import family_of
from core.model.shape import LayerShape
from tests.support.models import CONFIGS, SIZES, UNEQUAL, Float64Throughout, random_tokens, tiny

# No layer holds the others: each is the largest in one size, and groups have 3, 1 and 5 query heads.
CROSSED = (
    LayerShape(query_heads=6, kv_heads=2, mlp_width=31),
    LayerShape(query_heads=3, kv_heads=3, mlp_width=40),
    LayerShape(query_heads=5, kv_heads=1, mlp_width=7),
)


def write(folder, name, layers, *, dtype=torch.float64):
    if not family_of(CONFIGS[name]()).prunes_heads:
        layers = tuple(replace(layer, query_heads=6, kv_heads=3) for layer in layers)
    model = tiny(name, layers, dtype=dtype)
    save_model(model, folder, companions=None, provenance={"base": name})
    return model


def load_stock(folder, dtype=torch.float64):
    """As any tool does: transformers' own classes, without code of ours and without remote code."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy(model, tokens, count=6):
    with torch.no_grad(), Float64Throughout():
        return model.generate(
            tokens, max_new_tokens=count, do_sample=False, use_cache=True, eos_token_id=None
        )


@pytest.mark.parametrize("layers", [UNEQUAL, CROSSED], ids=["unequal", "crossed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_computes_the_same_from_the_padded_checkpoint(tmp_path, name, layers):
    ours = write(tmp_path / "unequal", name, layers)
    exported = export_padded(tmp_path / "unequal", tmp_path / "padded")
    stock = load_stock(tmp_path / "padded")
    assert type(stock).__module__.startswith("transformers.models.")
    with CheckpointReader(tmp_path / "padded") as written:
        assert set(written.names()) >= {name for name, _ in stock.named_parameters()}
    tokens = random_tokens(rows=2)
    with torch.no_grad(), Float64Throughout():
        torch.testing.assert_close(stock(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-12)
    assert torch.equal(greedy(stock, tokens), greedy(ours, tokens))
    assert exported.params == sum(parameter.numel() for parameter in stock.parameters())


def test_biases_that_no_plain_config_of_the_family_describes_are_refused(tmp_path):
    config = Qwen2Config(**SIZES, output_biases=True)
    save_model(build_model(config), tmp_path / "biased", companions=None, provenance={})
    with pytest.raises(ExportError, match="qwen2 has no biases in o_proj and down_proj"):
        export_padded(tmp_path / "biased", tmp_path / "padded")


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_every_weight_is_there_bit_by_bit_and_all_else_is_zero(tmp_path, name):
    layers = (UNEQUAL[0], UNEQUAL[1], LayerShape(query_heads=2, kv_heads=1, mlp_width=7))
    write(tmp_path / "unequal", name, layers, dtype=torch.bfloat16)
    export_padded(tmp_path / "unequal", tmp_path / "padded")
    family = family_of(CONFIGS[name]())
    with CheckpointReader(tmp_path / "unequal") as before, CheckpointReader(tmp_path / "padded") as after:
        assert sorted(before.names()) == sorted(after.names())
        for weight in before.names():
            old, new = before.tensor(weight), after.tensor(weight)
            assert old.dtype == new.dtype == torch.bfloat16
            if weight.split(".", 3)[-1] in family.slicings:
                # Groups are of equal size, so nothing is copied: without zeros it is what it was.
                assert (old != 0).all()
                old, new = old.flatten(), new[new != 0]
            assert torch.equal(old.view(torch.int16), new.view(torch.int16)), weight


def test_a_group_that_is_too_large_for_its_slot_takes_copies_of_its_kv_head(tmp_path):
    # Four heads of a KV head each hold three heads that share one, if that is there three times.
    layers = (
        LayerShape(query_heads=4, kv_heads=4, mlp_width=20),
        LayerShape(query_heads=3, kv_heads=1, mlp_width=20),
        LayerShape(query_heads=2, kv_heads=2, mlp_width=20),
    )
    write(tmp_path / "unequal", "llama", layers)
    export_padded(tmp_path / "unequal", tmp_path / "padded")
    config = load_stock(tmp_path / "padded").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 4)
    size = head_dim(config)
    with CheckpointReader(tmp_path / "padded") as reader:
        keys = reader.tensor("model.layers.1.self_attn.k_proj.weight").split(size)
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[0], keys[2])
    assert not keys[3].any()


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        # The largest counts hold all layers.
        ([(6, 3), (4, 2), (2, 1)], (6, 3)),
        # Groups of 3 heads in all layers, but fewer KV heads in some.
        ([(3, 1), (6, 2), (3, 1)], (6, 2)),
        # Four heads of their own KV heads cost less than six in three groups, which hold all layers too.
        ([(4, 1), (3, 3), (2, 2)], (4, 4)),
        # Llama refuses 5 heads at a hidden size of 48.
        ([(5, 5), (5, 5), (5, 5)], (6, 6)),
        # It refuses 9 too. Groups of 4 with one zero head each cost less than a fourth KV head.
        ([(9, 3), (9, 3), (6, 2)], (12, 3)),
    ],
)
def test_head_counts_are_the_cheapest_that_hold_all_layers_and_that_the_config_accepts(
    tmp_path, heads, expected
):
    layers = [LayerShape(query_heads=query, kv_heads=kv, mlp_width=20) for query, kv in heads]
    write(tmp_path / "unequal", "llama", layers)
    export_padded(tmp_path / "unequal", tmp_path / "padded")
    config = load_stock(tmp_path / "padded").config
    assert (config.num_attention_heads, config.num_key_value_heads) == expected


def test_the_config_is_the_familys_own(tmp_path):
    write(tmp_path / "unequal", "mistral", UNEQUAL)
    written = json.loads((tmp_path / "unequal" / "config.json").read_text())
    written |= {
        "architectures": ["SomethingElse"],
        "auto_map": {"AutoModelForCausalLM": "code.SomethingElse"},
    }
    (tmp_path / "unequal" / "config.json").write_text(json.dumps(written))
    export_padded(tmp_path / "unequal", tmp_path / "padded")
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["model_type"] == "mistral"
    assert not config.keys() & {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"}
    assert config["head_dim"] == 10
    provenance = json.loads((tmp_path / "padded" / "adapt_pruner.json").read_text())
    assert provenance == {"base": "mistral", "padded_from": [layer.to_dict() for layer in UNEQUAL]}


def test_tokenizer_and_generation_config_come_along(tmp_path, tokenizer):
    write(tmp_path / "unequal", "llama", UNEQUAL)
    tokenizer.save_pretrained(tmp_path / "unequal")
    (tmp_path / "unequal" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    export_padded(tmp_path / "unequal", tmp_path / "padded")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "padded" / name).read_bytes() == (tmp_path / "unequal" / name).read_bytes()
    assert load_stock(tmp_path / "padded").generation_config.temperature == 0.5


def test_the_notes_say_what_it_costs(tmp_path):
    ours = write(tmp_path / "unequal", "llama", UNEQUAL)
    exported = export_padded(tmp_path / "unequal", tmp_path / "padded")
    size, cache = exported.notes
    before = sum(parameter.numel() for parameter in ours.parameters())
    assert f"from {before:,} to {exported.params:,} parameters" in size
    assert "6 query heads, 3 KV heads, MLP width 40" in size
    assert "1.50x" in cache  # 9 KV heads instead of 3 + 2 + 1


def test_a_checkpoint_of_equal_layers_stays_as_it_is(tmp_path):
    ours = write(tmp_path / "equal", "llama", (UNEQUAL[0],) * 3)
    exported = export_padded(tmp_path / "equal", tmp_path / "padded")
    assert exported.notes == ("All layers are of the same size: nothing was added.",)
    for (name, old), new in zip(
        ours.named_parameters(), load_stock(tmp_path / "padded").parameters(), strict=True
    ):
        assert torch.equal(old, new), name


def test_heads_that_are_normalised_together_are_refused(tmp_path):
    model = tiny("olmo2", UNEQUAL)
    save_model(model, tmp_path / "unequal", companions=None, provenance={})
    with pytest.raises(ExportError, match="olmo2 with different head counts cannot be padded"):
        export_padded(tmp_path / "unequal", tmp_path / "padded")
    assert [path.name for path in tmp_path.iterdir()] == ["unequal"]


def test_the_padded_checkpoint_is_one_of_ours_too(tmp_path):
    ours = write(tmp_path / "unequal", "gemma3", UNEQUAL)
    export_padded(tmp_path / "unequal", tmp_path / "padded")
    again = load_model(tmp_path / "padded")
    assert config_with_layers(again.config, UNEQUAL).is_heterogeneous
    tokens = random_tokens()
    with torch.no_grad(), Float64Throughout():
        torch.testing.assert_close(again(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-12)
