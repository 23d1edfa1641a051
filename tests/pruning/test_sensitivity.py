import math

import pytest
import torch

from core.errors import CheckpointError, TargetError
from core.model.build import model_shape
from core.model.config import layer_shapes
from core.progress import Progress
from core.pruning.plan import LayerPlan
from core.pruning.scoring.calibration import measure
from core.pruning.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    layer_sensitivity,
    losses_with_layer_pruned,
    plans_for_layers,
)
from core.pruning.surgery import prune_model
from tests.support.models import UNEQUAL, random_tokens, tiny

TOKENS = random_tokens(rows=7)  # three batches of 3, 3 and 1


def whole(shape):
    return LayerPlan(
        query_heads=tuple(range(shape.query_heads)),
        kv_heads=tuple(range(shape.kv_heads)),
        mlp_channels=tuple(range(shape.mlp_width)),
    )


def loss_of(model, tokens=TOKENS):
    """The mean loss, plainly, all sequences at once; transformers' own is float32."""
    with torch.no_grad():
        chances = model(tokens).logits[:, :-1].log_softmax(dim=-1)
    return -chances.gather(-1, tokens[:, 1:, None]).mean().item()


def study(model, **changes):
    settings = {"sparsity": 0.5, "part": "both", "attention_unit": "kv_group", "batch_size": 3} | changes
    return layer_sensitivity(model, TOKENS, measure(model, random_tokens(seed=5), micro_batch=2), **settings)


def plans_of(model, *, sparsity=0.5, part="both", attention_unit="kv_group"):
    statistics = measure(model, random_tokens(seed=5), micro_batch=2)
    shape = model_shape(model.config)
    return plans_for_layers(statistics, shape, sparsity=sparsity, part=part, attention_unit=attention_unit)


@pytest.mark.parametrize(
    ("name", "layers", "unit"),
    [
        ("llama", None, "kv_group"),
        ("llama-tied", UNEQUAL, "kv_group"),
        ("llama-biased", None, "query_head"),
        ("qwen2", UNEQUAL, "query_head"),
    ],
    ids=lambda value: "unequal" if value is UNEQUAL else value or "equal",
)
def test_each_loss_is_that_of_the_model_with_only_that_layer_cut(name, layers, unit):
    model = tiny(name, layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = study(model, attention_unit=unit, sparsity=0.6)
    plans = plans_of(model, attention_unit=unit, sparsity=0.6)
    shapes = layer_shapes(model.config)
    assert found.loss == pytest.approx(loss_of(model), abs=1e-12)
    for index, (layer, plan) in enumerate(zip(found.layers, plans, strict=True)):
        assert plan.shape() != shapes[index]
        alone = [plan if i == index else whole(shape) for i, shape in enumerate(shapes)]
        pruned = prune_model(model, tuple(alone))
        assert layer.loss == pytest.approx(loss_of(pruned), abs=1e-12)
        assert layer.loss_increase == pytest.approx(layer.loss - found.loss, abs=1e-15)
        cut, full = (sum(p.numel() for p in m.model.layers[index].parameters()) for m in (pruned, model))
        assert layer.removed == pytest.approx(1 - cut / full)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_importance_is_one_less_the_cosine_of_input_and_output():
    model, tokens = tiny("llama"), random_tokens(seed=5)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    first = 1 - torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean().item()
    assert study(model).layers[0].importance == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize(
    ("part", "unit", "sizes"),
    [
        ("both", "kv_group", (4, 2, 20)),
        ("mlp", "kv_group", (6, 3, 20)),
        ("attention", "kv_group", (4, 2, 40)),
        ("attention", "query_head", (3, 3, 40)),
        ("both", "none", (6, 3, 20)),
    ],
)
def test_layers_lose_the_part_that_is_asked_for(part, unit, sizes):
    for plan in plans_of(tiny("qwen2"), part=part, attention_unit=unit):
        shape = plan.shape()
        assert (shape.query_heads, shape.kv_heads, shape.mlp_width) == sizes


@pytest.mark.parametrize(
    ("part", "sparsity", "unit"), [("attention", 0.3, "kv_group"), ("both", 0.01, "none")]
)
def test_a_sparsity_that_removes_nothing_is_an_error(part, sparsity, unit):
    with pytest.raises(TargetError, match=rf"a sparsity of {sparsity} removes no whole group"):
        plans_of(tiny("llama"), part=part, sparsity=sparsity, attention_unit=unit)


def test_the_layers_below_the_pruned_one_do_not_run_again():
    model, runs = tiny("llama"), [0, 0, 0]
    plans = plans_of(model)

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(index))
    losses_with_layer_pruned(model, TOKENS, plans, batch_size=7)
    assert runs == [2, 3, 4]


def test_a_model_in_training_mode_and_an_error_leave_no_trace(monkeypatch):
    model = tiny("llama").train()
    plans = plans_of(model)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", fail)
        with pytest.raises(KeyboardInterrupt):
            losses_with_layer_pruned(model, TOKENS, plans, batch_size=3)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="not a number"):
        losses_with_layer_pruned(model, TOKENS, plans, batch_size=3)


def test_ranks_of_equal_values_are_shared():
    def correlation(importance, increases):
        layers = tuple(
            LayerSensitivity(importance=a, removed=0.5, loss=1 + b, loss_increase=b)
            for a, b in zip(importance, increases, strict=True)
        )
        return Sensitivity(loss=1.0, layers=layers).rank_correlation()

    assert correlation([1, 2, 3], [0.1, 0.5, 9.0]) == pytest.approx(1)
    assert correlation([1, 2, 3], [9.0, 0.5, 0.1]) == pytest.approx(-1)
    # By hand: ranks 0 1 2 3 and 0 1.5 1.5 3 have covariance 4.5, variances 5 and 4.5.
    assert correlation([1, 2, 3, 4], [0.1, 0.2, 0.2, 0.3]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert correlation([1, 1], [0.1, 0.2]) is None
