"""Sheared-LLaMA: hard-concrete masks, their Lagrangian, and the model that they leave."""

import copy
from dataclasses import replace

import pytest
import torch

from core.errors import SettingsError, TargetError, TrainingError
from core.model.build import model_of, model_shape
from core.model.config import layer_shapes
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel
from core.model.shape import LayerShape
from core.pruning.methods import mask_learning, sheared_llama
from core.pruning.methods.mask_learning import MaskTraining, kept_share, learn_masks, sampled
from core.pruning.methods.masks import HIDDEN, LAYERS, masked, put_into_weights
from core.pruning.methods.opened import OpenedModel
from core.pruning.methods.pruned import pruned_model
from core.pruning.methods.sheared_llama import masking_decision
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


def decided(model, share=0.7, **settings):
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
            target_params=round(share * dense.num_params()),
            steps_left=1,
            settings=settings,
        )
    )
    return step, made[0], opened.figures


@pytest.mark.parametrize(
    ("name", "unit", "layer", "hidden_size", "share", "depth"),
    [
        ("llama-biased", "kv_group", (4, 2), "100%", 0.7, 3),
        ("qwen2-tied", "query_head", (3, 3), "100%", 0.7, 3),
        ("phi3", "none", (6, 3), "100%", 0.7, 3),
        ("llama-output-biases", "kv_group", (4, 2), "50%", 0.35, 3),
        ("qwen2-tied", "none", (6, 3), "50%", 0.4, 3),
        ("llama-output-biases", "kv_group", (4, 2), "100%", 0.5, 2),
        ("qwen2-tied", "none", (6, 3), "50%", 0.35, 2),
        ("gemma2", "query_head", (3, 3), "100%", 0.26, 1),
        ("olmo2", "none", (6, 3), "100%", 0.6, 2),
    ],
)
def test_the_masked_model_is_the_one_that_is_made_and_the_one_that_is_cut(
    name, unit, layer, hidden_size, share, depth, monkeypatch
):
    model, learnt = tiny(name), {}

    def remember(model, *arguments, **others):
        found = learn_masks(model, *arguments, **others)
        learnt.update(logits=found.logits, weights=copy.deepcopy(model))
        return found

    monkeypatch.setattr(sheared_llama, "learn_masks", remember)
    before = model.model.embed_tokens.weight.clone()
    with Float64Throughout():
        step, made, figures = decided(
            model,
            share,
            hidden_size=hidden_size,
            layers="auto" if depth == 3 else str(depth),
            phases=1,
            attention_unit=unit,
            mask_steps=6,
            mask_rate=1.0,
            distill_batch_tokens="24",
            width_multiple=1,
        )
        whole = learnt["weights"]
        masks = {
            key: mask_of(a, key, step.layers)
            for key, a in learnt["logits"].items()
            if key[0] < 0 or step.layers[key[0]].stays
        }
        with torch.no_grad(), masked(whole, masks, hidden_size=made.config.hidden_size):
            expected = whole(TOKENS).logits
        torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-10)
        cut = prune_model(made, step.layers)
        torch.testing.assert_close(cut(TOKENS).logits, expected, rtol=0, atol=1e-10)
    assert cut.config.num_hidden_layers == depth
    if depth == 2:
        assert any(0 < mask < 1 for mask in masks[LAYERS]), "what is left of a mask goes into the weights"
    assert layer in [(shape.query_heads, shape.kv_heads) for shape in layer_shapes(cut.config)]
    params = sum(p.numel() for p in cut.parameters())
    dense = model_shape(model.config)
    assert abs(params - share * dense.num_params()) <= dense.mlp_channel_params / 2
    assert cut.config.hidden_size == (48 if hidden_size == "100%" else 24)
    assert params == step.shape.num_params()
    assert not any(
        torch.equal(before[:, channel], cut.model.embed_tokens.weight[:, 0]) for channel in range(48)
    )
    assert all((mask == 0).any() and (mask > 0).any() for mask in masks.values())
    assert len(masks) == (hidden_size != "100%") + (depth < 3) + depth + (unit != "none") * sum(
        shape.query_heads < 6 for shape in layer_shapes(cut.config)
    )
    assert (figures["mask_tokens"], len(figures["mask_losses"])) == (6 * 2 * 12, 6)


def mask_of(a, key, layers):
    """The mask of the groups of a layer that have the highest logits; 0 for the others."""
    if key == HIDDEN:
        best = a >= a.sort(descending=True).values[23]
        assert best.sum() == 24
        return torch.where(best, (1.2 * a.sigmoid() - 0.1).clamp(0, 1), 0.0)
    if key == LAYERS:
        stay = [plan.stays for plan in layers]
        assert a[stay].min() > a[[not plan.stays for plan in layers]].max()
        return torch.where(torch.tensor(stay), (1.2 * a.sigmoid() - 0.1).clamp(0, 1), 0.0)
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


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "granite", "llama-output-biases", "smollm3"])
def test_masks_of_layers_weigh_what_is_added_to_the_signal_and_go_into_the_weights(name):
    model = tiny(name)
    skipping, weighed = copy.deepcopy(model), copy.deepcopy(model)
    with Float64Throughout(), torch.no_grad():
        skipping.model.layers[1].forward = lambda hidden_states, **_: hidden_states
        with masked(model, {LAYERS: torch.tensor([1.0, 0.0, 1.0])}):
            assert torch.equal(model(TOKENS).logits, skipping(TOKENS).logits)
        masks = {LAYERS: torch.tensor([0.7, 0.2, 1.0], dtype=torch.float64)}
        with masked(model, masks):
            expected = model(TOKENS).logits
        put_into_weights(weighed, masks)
        torch.testing.assert_close(weighed(TOKENS).logits, expected, rtol=0, atol=1e-10)
        assert (expected - model(TOKENS).logits).abs().max() > 1e-3


def test_the_gradients_are_those_of_the_models_own_loss():
    model, generator = tiny("llama"), torch.Generator().manual_seed(1)
    drawn = {
        (0, "self_attn.o_proj"): torch.rand(3, generator=generator, dtype=torch.float64),
        (2, "mlp.down_proj"): torch.rand(40, generator=generator, dtype=torch.float64),
        HIDDEN: torch.rand(48, generator=generator, dtype=torch.float64),
        LAYERS: torch.rand(3, generator=generator, dtype=torch.float64),
    }
    model.requires_grad_(True)
    with Float64Throughout():
        loss, gradients = mask_learning._gradients(model, TOKENS, drawn, replace(TRAINING, micro_batch=1))
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
    logits = learn_masks(model, TOKENS, SHAPE, replace(TRAINING, steps=100), hidden_size=48, depth=3).logits
    dense = layer_shapes(model.config)
    assert len(logits) == 4, "whole heads in layer 1 and a whole MLP in layer 2 have no masks"
    for (index, path), a in logits.items():
        size = "kv_heads" if path == "self_attn.o_proj" else "mlp_width"
        wanted = getattr(SHAPE[index], size) / getattr(dense[index], size)
        assert kept_share(a).item() == pytest.approx(wanted, abs=0.04)


def closed_groups(model):
    """The query heads and the MLP channels that nothing reads."""
    closed = 0
    for layer in model.model.layers:
        heads = layer.self_attn.o_proj.weight.view(48, -1, 10)
        closed += int((heads == 0).all(dim=2).all(dim=0).sum())
        closed += int((layer.mlp.down_proj.weight == 0).all(dim=0).sum())
    return closed


LONG = dict(phases=1, width_multiple=1, distill_batch_tokens="24", mask_rate=1.0)


@pytest.mark.parametrize(
    ("unit", "share", "steps"),
    [("kv_group", 0.7, 60), ("kv_group", 0.7, 200), ("query_head", 0.7, 60), ("none", 0.85, 60)],
)
def test_no_mask_of_what_stays_is_closed_and_the_shares_meet_the_target(unit, share, steps):
    model = tiny("llama", dtype=torch.float32)
    step, made, figures = decided(model, share, attention_unit=unit, mask_steps=steps, **LONG)
    cut = prune_model(made, step.layers)
    assert closed_groups(cut) == 0
    assert figures["mask_closed"] == 0
    for path, size, whole in (("self_attn.o_proj", "query_heads", 6), ("mlp.down_proj", "mlp_width", 40)):
        left = [getattr(layer, size) / whole for layer in layer_shapes(cut.config)]
        masked = [each for each in left if each < 1]
        assert bool(masked) == (f"mask_share/{path}" in figures)
        if masked:
            wanted = sum(masked) / len(masked)
            assert figures[f"mask_share/{path}"] == pytest.approx(wanted, abs=0.06)


def test_closed_masks_of_what_stays_are_counted_and_told(monkeypatch, caplog):
    def close(*arguments, **others):
        found = learn_masks(*arguments, **others)
        found.logits[0, "mlp.down_proj"].fill_(-5)
        found.logits[1, "self_attn.o_proj"].fill_(-5)
        return found

    monkeypatch.setattr(sheared_llama, "learn_masks", close)
    with caplog.at_level("INFO", logger="core.pruning.methods.sheared_llama"):
        step, made, figures = decided(
            tiny("llama", dtype=torch.float32), 0.7, attention_unit="kv_group", mask_steps=6, **LONG
        )
    closed = len(step.layers[0].mlp_channels) + len(step.layers[1].query_heads)
    assert figures["mask_closed"] == closed == closed_groups(prune_model(made, step.layers))
    assert f"of mlp.down_proj; {closed} groups that stay have a mask of 0" in caplog.text


def test_the_highest_of_each_row_are_held_open_and_no_others_change():
    rows = torch.tensor([[-9.0, 2.0, -3.0, -4.0], [-5.0, -1.0, 0.5, -6.0]])
    mask_learning._hold_open(rows, 0.5)
    expected = [[-9.0, 2.0, mask_learning.FLOOR, -4.0], [-5.0, -1.0, 0.5, -6.0]]
    torch.testing.assert_close(rows, torch.tensor(expected))
    assert kept_share(torch.tensor([mask_learning.FLOOR])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("hidden_size", [24, 36])
def test_the_multipliers_bring_the_embedding_channels_near_the_target(hidden_size):
    model = tiny("llama", dtype=torch.float32)
    whole, training = layer_shapes(model.config), replace(TRAINING, steps=100)
    logits = learn_masks(model, TOKENS, whole, training, hidden_size=hidden_size, depth=3).logits
    assert list(logits) == [HIDDEN]
    # Within 0.09 for four seeds each, below in all; 0.98 are open at first.
    assert kept_share(logits[HIDDEN]).item() == pytest.approx(hidden_size / 48, abs=0.1)


def test_a_loss_that_is_not_finite_ends_it():
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1 of 6.*Lower prune\.distill_rate"):
        learn_masks(model, TOKENS, SHAPE, TRAINING, hidden_size=48, depth=3)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_multipliers_bring_the_layers_near_the_target(depth):
    model = tiny("llama", dtype=torch.float32)
    whole, training = layer_shapes(model.config), replace(TRAINING, steps=100)
    logits = learn_masks(model, TOKENS, whole, training, hidden_size=48, depth=depth).logits
    assert list(logits) == [LAYERS]
    assert kept_share(logits[LAYERS]).item() == pytest.approx(depth / 3, abs=0.04)


def test_the_gradient_of_layer_logits_is_the_difference_of_the_loss_of_models_with_scaled_blocks():
    model, a = tiny("llama"), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def drawn(a):
        return sampled(a, torch.Generator().manual_seed(5))

    def loss(a):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for z, layer in zip(drawn(a), scaled.model.layers, strict=True):
                layer.self_attn.o_proj.weight.mul_(z)
                layer.mlp.down_proj.weight.mul_(z)
            return scaled(TOKENS, labels=TOKENS).loss.item()

    assert ((drawn(a) > 0.05) & (drawn(a) < 0.95)).all()
    with Float64Throughout():
        leaf = a.clone().requires_grad_()
        found, (gradient,) = mask_learning._gradients(
            model.requires_grad_(True), TOKENS, {LAYERS: drawn(leaf)}, replace(TRAINING, micro_batch=1)
        )
        drawn(leaf).backward(gradient)
        assert found == pytest.approx(loss(a), rel=1e-12)
        for index, step in enumerate(1e-5 * torch.eye(3, dtype=torch.float64)):
            slope = (loss(a + step) - loss(a - step)) / 2e-5
            assert leaf.grad[index].item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("layers", "share", "problem"),
    [
        ("3", 0.5, r"layers=3 leaves all 3 layers"),
        ("99%", 0.5, r"layers=99% leaves all 3 layers"),
        ("34%", 0.9, r"layers=34% alone leaves .* \(1 of 3 layers\), fewer than the target"),
        ("2", 0.2, r"in each of 2 layers the model still has"),
    ],
)
def test_a_number_of_layers_that_does_not_suit_the_size_is_refused(layers, share, problem):
    with pytest.raises(TargetError, match=problem):
        decided(tiny("llama"), share, layers=layers, phases=1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": "0"}, "layers=0 must be positive. Ask for the decoder layers"),
        ({"layers": "deep"}, "neither a count"),
        ({"method": "minitron"}, "method=minitron. Set method to sheared-llama or shortgpt or"),
        ({"phases": 2}, "phases=2. Set phases to 1"),
    ],
)
def test_settings_that_do_not_go_with_a_number_of_layers_are_refused(changes, problem):
    with pytest.raises(SettingsError, match=problem):
        PruneSettings(**{"method": "sheared-llama", "phases": 1, "layers": "2"} | changes)


@pytest.mark.parametrize("method", ["shortgpt", "minitron-depth"])
def test_other_methods_leave_as_many_layers_as_are_asked_for_too(method):
    model = tiny("llama", (LayerShape(query_heads=6, kv_heads=3, mlp_width=200),) * 3)
    dense = model_shape(model.config)
    for layers, count in (("auto", 1), ("67%", 2)):
        settings = PruneSettings(method=method, phases=1, layers=layers, width_multiple=1)
        smaller = pruned_model(
            model,
            measure(model, TOKENS, criterion=settings.applied().criterion),
            settings=settings,
            target_params=round(0.35 * dense.num_params()),
            remeasure=None,
            tokens=TOKENS,
        )
        assert smaller.config.num_hidden_layers == count
        missed = sum(p.numel() for p in smaller.parameters()) - round(0.35 * dense.num_params())
        assert abs(missed) <= dense.mlp_channel_params / 2
