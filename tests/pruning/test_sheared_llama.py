"""Sheared-LLaMA: hard-concrete masks, their Lagrangian, and the model that they leave."""

import copy
from dataclasses import replace

import pytest
import torch

from core.errors import TrainingError
from core.model.build import model_of, model_shape
from core.model.config import layer_shapes
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel
from core.model.shape import LayerShape
from core.pruning.methods import sheared_llama
from core.pruning.methods.opened import OpenedModel
from core.pruning.methods.sheared_llama import (
    MaskTraining,
    kept_share,
    learn_masks,
    masked,
    masking_decision,
    sampled,
)
from core.pruning.planning import StepRequest, settings_for
from core.pruning.scoring.calibration import measure
from core.pruning.surgery import prune_model
from core.settings.prune import PruneSettings
from tests.support.models import Float64Throughout, random_tokens, tiny

SHAPE = (
    LayerShape(query_heads=4, kv_heads=2, mlp_width=31),
    LayerShape(query_heads=6, kv_heads=3, mlp_width=17),
    LayerShape(query_heads=2, kv_heads=1, mlp_width=40),
)
TRAINING = MaskTraining(steps=6, batch=2, micro_batch=2, rate=1e-4, mask_rate=1.0, autocast=False, seed=0)
TOKENS = random_tokens()


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_the_expected_share_is_that_of_many_draws(logit):
    logits = torch.full((200_000,), logit, dtype=torch.float64)
    drawn = sampled(logits, torch.Generator().manual_seed(0))
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert (drawn > 0).double().mean() == pytest.approx(kept_share(logits).item(), abs=0.004)


def decided(model, **settings):
    """The step that is decided on a model, and the model that is made for it."""
    settings = settings_for(PruneSettings(method="sheared-llama", **settings), family_of(model.config))
    made, dense = [], model_shape(model.config)

    def remake(config, parts):
        state = {name: tensor.clone() for part in parts for name, tensor in part.items()}
        made.append(model_of(config, state, dtype=model.dtype, device="cpu"))

    opened = OpenedModel(
        model=LayerwiseModel(model), tokens=TOKENS, micro_batch=1, autocast=False, seed=3, remake=remake
    )
    step = masking_decision(opened)(
        StepRequest(
            statistics=measure(model, TOKENS, criterion="magnitude_l2"),
            dense=dense,
            current=dense,
            sparsity=(0.0,) * len(dense.layers),
            target_params=round(0.7 * dense.num_params()),
            steps_left=1,
            settings=settings,
        )
    )
    return step, made[0], opened.figures


@pytest.mark.parametrize(
    ("name", "unit", "layer"),
    [
        ("llama-biased", "kv_group", (4, 2)),
        ("qwen2-tied", "query_head", (3, 3)),
        ("phi3", "none", (6, 3)),
    ],
)
def test_the_masked_model_is_the_one_that_is_made_and_the_one_that_is_cut(name, unit, layer, monkeypatch):
    model, learnt = tiny(name), {}

    def remember(model, *arguments):
        learnt["logits"], losses = learn_masks(model, *arguments)
        learnt["weights"] = copy.deepcopy(model)
        return learnt["logits"], losses

    monkeypatch.setattr(sheared_llama, "learn_masks", remember)
    before = model.model.embed_tokens.weight.clone()
    with Float64Throughout():
        step, made, figures = decided(
            model,
            attention_unit=unit,
            mask_steps=6,
            mask_rate=1.0,
            distill_batch_tokens="24",
            width_multiple=1,
        )
        whole = learnt["weights"]
        masks = {key: mask_of(a, key, step.layers) for key, a in learnt["logits"].items()}
        with torch.no_grad(), masked(whole, masks):
            expected = whole(TOKENS).logits
        torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-10)
        cut = prune_model(made, step.layers)
        torch.testing.assert_close(cut(TOKENS).logits, expected, rtol=0, atol=1e-10)
    assert layer in [(shape.query_heads, shape.kv_heads) for shape in layer_shapes(cut.config)]
    params = sum(p.numel() for p in cut.parameters())
    dense = model_shape(model.config)
    assert abs(params - 0.7 * dense.num_params()) <= dense.mlp_channel_params / 2
    assert params == step.shape.num_params()
    assert not torch.equal(before, cut.model.embed_tokens.weight)
    assert all((mask == 0).any() and (mask > 0).any() for mask in masks.values())
    assert len(masks) == 3 + (unit != "none") * sum(
        shape.query_heads < 6 for shape in layer_shapes(cut.config)
    )
    assert (figures["mask_tokens"], len(figures["mask_losses"])) == (6 * 2 * 12, 6)


def mask_of(a, key, layers):
    """The mask of the groups of a layer that have the highest logits; 0 for the others."""
    plan, path = layers[key[0]], key[1]
    kept = plan.mlp_channels
    if path == "self_attn.o_proj":
        kept = plan.kv_heads if len(a) == 3 else plan.query_heads
    rows = a.view(3, -1) if len(a) == 6 else a[None]  # query heads compete within their group
    best = rows.argsort(dim=1, descending=True)[:, : len(kept) // len(rows)]
    places = best + torch.arange(len(rows))[:, None] * rows.shape[1]
    assert list(kept) == sorted(places.flatten().tolist())
    mask = torch.zeros_like(a)
    mask[list(kept)] = (1.2 * a[list(kept)].sigmoid() - 0.1).clamp(0, 1)
    return mask


def test_the_gradients_are_those_of_the_models_own_loss():
    model, generator = tiny("llama"), torch.Generator().manual_seed(1)
    drawn = {
        (0, "self_attn.o_proj"): torch.rand(3, generator=generator, dtype=torch.float64),
        (2, "mlp.down_proj"): torch.rand(40, generator=generator, dtype=torch.float64),
    }
    model.requires_grad_(True)
    with Float64Throughout():
        loss, gradients = sheared_llama._gradients(model, TOKENS, drawn, replace(TRAINING, micro_batch=1))
        of_weights = {name: p.grad.clone() for name, p in model.named_parameters()}
        masks = {key: mask.requires_grad_() for key, mask in drawn.items()}
        model.zero_grad()
        with masked(model, masks):
            expected = model(TOKENS, labels=TOKENS).loss
        expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for found, mask in zip(gradients, masks.values(), strict=True):
        torch.testing.assert_close(found, mask.grad, rtol=1e-8, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(of_weights[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_the_multipliers_bring_the_expected_shape_to_the_target():
    model = tiny("llama", dtype=torch.float32)
    logits, _ = learn_masks(model, TOKENS, SHAPE, replace(TRAINING, steps=100))
    dense = layer_shapes(model.config)
    assert len(logits) == 4, "whole heads in layer 1 and a whole MLP in layer 2 have no masks"
    for (index, path), a in logits.items():
        size = "kv_heads" if path == "self_attn.o_proj" else "mlp_width"
        wanted = getattr(SHAPE[index], size) / getattr(dense[index], size)
        assert kept_share(a).item() == pytest.approx(wanted, abs=0.06)


def test_a_loss_that_is_not_finite_ends_it():
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1 of 6.*Lower prune\.distill_rate"):
        learn_masks(model, TOKENS, SHAPE, TRAINING)
