"""Sheared-LLaMA: hard-concrete masks, their Lagrangian, and the model that they leave."""

import copy

import pytest
import torch

from core.model.config import layer_shapes
from core.model.shape import LayerShape
from core.pruning.methods import sheared_llama
from core.pruning.methods.sheared_llama import (
    domain_weights,
    final_masks,
    kept_share,
    learn_masks,
    masked,
    sampled,
    sheared_model,
)
from tests.support.models import Float64Throughout, random_tokens, tiny

SHAPE = (
    LayerShape(query_heads=4, kv_heads=2, mlp_width=31),
    LayerShape(query_heads=6, kv_heads=3, mlp_width=17),
    LayerShape(query_heads=2, kv_heads=1, mlp_width=40),
)
TRAINING = dict(steps=6, batch=2, rate=1e-4, mask_rate=1.0, seed=0)


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_the_expected_share_is_that_of_many_draws(logit):
    logits = torch.full((200_000,), logit, dtype=torch.float64)
    drawn = sampled(logits, torch.Generator().manual_seed(0))
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert (drawn > 0).double().mean() == pytest.approx(kept_share(logits).item(), abs=0.004)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "phi3"])
def test_the_masked_model_is_the_one_that_is_cut(name, monkeypatch):
    model, tokens = tiny(name), random_tokens()
    learnt = {}

    def remember(model, *arguments, **keywords):
        learnt["logits"] = learn_masks(model, *arguments, **keywords)
        learnt["weights"] = copy.deepcopy(model)
        return learnt["logits"]

    monkeypatch.setattr(sheared_llama, "learn_masks", remember)
    before = model.model.embed_tokens.weight.clone()
    with Float64Throughout():
        cut, plans = sheared_model(model, tokens, SHAPE, **TRAINING)
        whole, masks = learnt["weights"], final_masks(learnt["logits"], plans)
        with torch.no_grad(), masked(whole, masks):
            expected = whole(tokens).logits
        torch.testing.assert_close(cut(tokens).logits, expected, rtol=0, atol=1e-10)
    assert layer_shapes(cut.config) == SHAPE
    assert not torch.equal(before, cut.model.embed_tokens.weight)
    assert all((mask == 0).any() and (mask > 0).any() for mask in masks.values())
    assert len(masks) == 4, "whole heads in layer 1 and a whole MLP in layer 2 have no masks"


def test_the_multipliers_bring_the_expected_shape_to_the_target():
    model, tokens = tiny("llama", dtype=torch.float32), random_tokens()
    logits = learn_masks(model, tokens, SHAPE, **TRAINING | {"steps": 400, "mask_rate": 0.1})
    dense = layer_shapes(model.config)
    for (index, path), a in logits.items():
        size = "kv_heads" if path == "self_attn.o_proj" else "mlp_width"
        wanted = getattr(SHAPE[index], size) / getattr(dense[index], size)
        assert kept_share(a).item() == pytest.approx(wanted, abs=0.06)


def test_domains_that_lag_behind_their_reference_get_more():
    weights = torch.tensor([0.5, 0.3, 0.2])
    found = domain_weights(weights, torch.tensor([2.0, 3.0, 1.0]), torch.tensor([2.5, 2.0, 1.0]))
    raised = torch.tensor([0.5, 0.3 * torch.e, 0.2])
    torch.testing.assert_close(found, raised / raised.sum())
