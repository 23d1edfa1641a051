"""Minitron's hidden size: channels ranked by what the norms give, and all matrices cut along it."""

import pytest
import torch

from core.errors import SettingsError, TargetError, UnsupportedModelError
from core.model.build import model_of, model_shape
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import config_with_hidden_size, layer_shapes
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel, open_streamed
from core.pruning.methods.minitron import channel_scores, narrowed_config, narrowed_parts
from core.pruning.methods.pruned import pruned_model
from core.pruning.scoring.calibration import measure
from core.settings.prune import PruneSettings
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny

NARROWABLE = [
    pytest.param(name, layers, id=name if layers is None else f"{name}-unequal")
    for name in CONFIGS
    if family_of(CONFIGS[name]()).slices_width and name != "phi3-longrope"
    for layers in ([None, UNEQUAL] if name in ("llama-biased", "qwen2-tied") else [None])
]
TOKENS = random_tokens(rows=6)
KEPT = torch.tensor([channel for channel in range(48) if channel % 3 or channel > 40][:30])


def narrowed(model, kept):
    config = config_with_hidden_size(model.config, len(kept))
    state = {n: t for part in narrowed_parts(LayerwiseModel(model), config, kept) for n, t in part.items()}
    return model_of(config, state, dtype=model.dtype, device="cpu")


def norms_of(model):
    return [module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))]


@pytest.mark.parametrize(("name", "layers"), NARROWABLE)
def test_what_is_left_is_the_model_without_these_channels_but_for_the_mean_of_the_norms(name, layers):
    """The dense model with zeros where channels went; its norms' mean over D is made that over D'."""
    model = tiny(name, layers)
    with torch.no_grad(), Float64Throughout():
        small = narrowed(model, KEPT)
        assert torch.equal(narrowed(model, torch.arange(48))(TOKENS).logits, model(TOKENS).logits)
        gone = [channel for channel in range(48) if channel not in KEPT]
        model.model.embed_tokens.weight[:, gone] = 0
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in projection.parameters():
                    parameter[gone] = 0
        assert (model(TOKENS).logits - small(TOKENS).logits).abs().max() > 1e-3
        for norm in norms_of(model):
            norm.weight *= (len(KEPT) / 48) ** 0.5
            norm.variance_epsilon *= len(KEPT) / 48
        torch.testing.assert_close(small(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-9)
    assert small.config.hidden_size == small.lm_head.in_features == 30
    assert layer_shapes(small.config) == layer_shapes(model.config)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-tied", "phi3"])
def test_a_channel_scores_what_the_norms_give_at_its_place_also_a_layer_at_a_time(name, tmp_path):
    model, expected = tiny(name), torch.zeros(48, dtype=torch.float64)
    with Float64Throughout():
        for norm in norms_of(model)[:-1]:
            seen = []
            hook = norm.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
            model(TOKENS)
            hook.remove()
            for channel in range(48):
                rows = [row[:, channel].abs().mean().item() for row in seen[0]]
                expected[channel] += sum(mean**2 for mean in rows) ** 0.5
        torch.testing.assert_close(channel_scores(LayerwiseModel(model), TOKENS, micro_batch=4), expected)
        save_model(model, tmp_path / "base", companions=None, provenance={})
        streamed = open_streamed(Checkpoint(tmp_path / "base"))
        torch.testing.assert_close(channel_scores(streamed, TOKENS), expected)
        config = config_with_hidden_size(model.config, 30)
        parts = {n: t for part in narrowed_parts(streamed, config, KEPT) for n, t in part.items()}
    for name, tensor in narrowed(model, KEPT).named_parameters():
        assert torch.equal(parts.pop(name), tensor)
    assert not parts


def prune(model, share, hidden_size, **others):
    settings = PruneSettings(method="minitron", phases=1, width_multiple=1, hidden_size=hidden_size, **others)
    return pruned_model(
        model,
        measure(model, TOKENS, criterion="activation_l2", micro_batch=4),
        settings=settings,
        target_params=round(share * model_shape(model.config).num_params()),
        remeasure=None,
        tokens=TOKENS,
    )


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "llama-tied"])
@pytest.mark.parametrize(("hidden_size", "channels", "share"), [("50%", 24, 0.45), ("30", 24, 0.4)])
def test_the_best_channels_and_groups_stay_and_the_size_is_exact(name, hidden_size, channels, share):
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    small = prune(model, share, hidden_size)
    best = channel_scores(LayerwiseModel(model), TOKENS).argsort(descending=True)[:channels].sort().values
    narrow = narrowed(model, best)
    assert small.config.hidden_size == channels
    assert torch.equal(small.model.embed_tokens.weight, narrow.model.embed_tokens.weight)
    found = sum(parameter.numel() for parameter in small.parameters())
    wanted = round(share * model_shape(model.config).num_params())
    assert abs(found - wanted) <= model_shape(small.config).mlp_channel_params / 2
    assert found == model_shape(small.config).num_params() < model_shape(narrow.config).num_params()
    scores = measure(model, TOKENS, criterion="activation_l2", micro_batch=4).scores
    for cut, whole, own in zip(small.model.layers, narrow.model.layers, scores, strict=True):
        width = cut.mlp.up_proj.out_features
        rows = own.mlp_channels.argsort(descending=True)[:width].sort().values
        assert torch.equal(cut.mlp.up_proj.weight, whole.mlp.up_proj.weight[rows])
    for shape in layer_shapes(small.config):
        assert shape.query_heads % shape.kv_heads == 0
        assert shape.kv_heads == 3
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    out = small.generate(TOKENS[:1, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 8)


def test_a_model_of_equal_layers_keeps_a_plain_config():
    """Of heads whose sizes do not follow from the hidden size any more."""
    from transformers import AutoModelForCausalLM

    model = narrowed(tiny("llama-tied"), torch.arange(24))
    assert "per_layer_config" not in model.config.to_dict()
    stock = AutoModelForCausalLM.from_config(type(model.config).from_dict(model.config.to_dict()))
    stock.double().load_state_dict(model.state_dict())
    assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("hidden_size", "share", "problem"),
    [
        ("98%", 0.5, r"leaves all 48 embedding channels: .* multiple of 24"),
        ("50%", 0.9, r"hidden_size=50% alone leaves .* \(24 embedding channels\), fewer than the target"),
    ],
)
def test_a_hidden_size_that_does_not_suit_the_size_is_refused(hidden_size, share, problem):
    with pytest.raises(TargetError, match=problem):
        prune(tiny("llama"), share, hidden_size)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gemma2", "gemma2' cannot lose embedding channels"),
        ("olmo2", "olmo2' cannot lose embedding channels"),
        ("phi3-longrope", "this phi3 cannot have 24 embedding channels: .*short_factor"),
    ],
)
def test_models_that_cannot_lose_embedding_channels_are_refused(name, problem):
    settings = PruneSettings(method="minitron", phases=1, hidden_size="50%")
    with pytest.raises(UnsupportedModelError, match=problem):
        narrowed_config(CONFIGS[name](), settings, 1000)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": "120%"}, "must lie between 0%"),
        ({"hidden_size": "wide"}, "neither a count"),
        ({"hidden_size": "0"}, "must be positive"),
        ({"method": "grail"}, "method=grail. Set method to minitron or sheared-llama"),
        ({"phases": 2}, "phases=2. Set phases to 1"),
        ({"profile": "portable"}, "profile=portable. Set profile to free"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, problem):
    with pytest.raises(SettingsError, match=problem):
        PruneSettings(**{"method": "minitron", "phases": 1, "hidden_size": "50%"} | changes)
