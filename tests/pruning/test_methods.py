"""The compared methods: exact sizes on Llama and Qwen2, and each rule against its own definition."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig

from core.errors import SettingsError, TargetError
from core.model.build import build_model, model_shape
from core.model.config import layer_shapes
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel
from core.pruning.methods.llm_pruner import whole_layers
from core.pruning.methods.method import decision_of
from core.pruning.methods.minitron import layers_to_go
from core.pruning.methods.opened import OpenedModel
from core.pruning.methods.pruned import pruned_model
from core.pruning.plan import LayerPlan
from core.pruning.planning import StepRequest, settings_for, shape_under
from core.pruning.scoring.calibration import measure
from core.pruning.surgery import prune_model
from core.pruning.widths.importance import shares
from core.settings.methods import MethodName
from core.settings.prune import PruneSettings
from tests.support.models import SIZES, UNEQUAL, random_tokens, tiny

METHODS = [name for name in get_args(MethodName) if name not in ("adapt-pruner", "slicegpt")]
TOKENS = random_tokens(rows=6)


def prune(model, method, share, *, target_params=None, multiple=1, tokens=TOKENS, **others):
    if method == "sheared-llama":
        others = {"mask_steps": 3, "mask_rate": 1.0, "distill_batch_tokens": "24"} | others
    settings = PruneSettings(method=method, width_multiple=multiple, **others)

    def statistics(model, step=0):
        return measure(model, tokens, criterion=settings.applied().criterion, micro_batch=4, seed=3)

    return pruned_model(
        model,
        statistics(model),
        settings=settings,
        target_params=target_params or round(share * model_shape(model.config).num_params()),
        remeasure=statistics,
        tokens=tokens,
    )


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_meets_the_size_twice_over_and_generates(method, family, multiple):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for share in (0.86, 0.76):
        dense = model_shape(model.config)
        target = round(share * model_shape(tiny(family).config).num_params())
        model = prune(model, method, share, target_params=target, multiple=multiple)
        missed = abs(sum(p.numel() for p in model.parameters()) - target)
        assert missed <= multiple * dense.mlp_channel_params / 2
    assert all(torch.equal(tiny(family).state_dict()[name], tensor) for name, tensor in before.items())
    out = model.generate(TOKENS[:1, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 8)
    assert bool(model(TOKENS).logits.isfinite().all())


def kept_of(before, after):
    """For each layer the heads, KV heads and channels of ``before`` that ``after`` has."""
    size, found = before.config.head_dim, []
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        rows = {
            "query": (old.self_attn.q_proj, new.self_attn.q_proj, size),
            "kv": (old.self_attn.k_proj, new.self_attn.k_proj, size),
            "mlp": (old.mlp.up_proj, new.mlp.up_proj, 1),
        }
        found.append({})
        for kind, (whole, cut, step) in rows.items():
            where = [(whole.weight[::step] == row).all(dim=1).nonzero().item() for row in cut.weight[::step]]
            found[-1][kind] = where
    return found


def deep(layers, **sizes):
    """A Llama of many small layers."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers} | sizes)
    model = build_model(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.dim() == 1))
    return model


@pytest.mark.parametrize(
    ("layers", "whole"),
    [
        (32, {0, 1, 2, 3, 30, 31}),
        (30, {0, 1, 2, 3, 28, 29}),
        (24, {0, 1, 2, 3, 22, 23}),
        (16, {0, 1, 15}),
        (12, {0, 1, 11}),
        (3, set()),
    ],
)
def test_llm_pruner_leaves_the_first_four_and_the_last_two_layers_whole(layers, whole):
    assert whole_layers(layers) == whole


def test_llm_pruner_keeps_in_all_other_layers_the_groups_with_the_largest_sum_of_weight_times_gradient():
    model = deep(12)
    smaller = prune(model, "llm-pruner", 0.75)
    model.requires_grad_(True)
    logits = model(TOKENS).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    widths, groups = [], []
    for index, (layer, kept) in enumerate(zip(model.model.layers, kept_of(model, smaller), strict=True)):
        if index in (0, 1, 11):
            assert {kind: len(units) for kind, units in kept.items()} == {"query": 6, "kv": 3, "mlp": 40}
            continue
        attention, mlp = layer.self_attn, layer.mlp
        scores = {"kv": [0.0] * 3, "mlp": [0.0] * 40}
        for group in range(3):
            own, heads = slice(10 * group, 10 * group + 10), slice(20 * group, 20 * group + 20)
            for part in (
                attention.q_proj.weight[heads] * attention.q_proj.weight.grad[heads],
                attention.k_proj.weight[own] * attention.k_proj.weight.grad[own],
                attention.v_proj.weight[own] * attention.v_proj.weight.grad[own],
                attention.o_proj.weight[:, heads] * attention.o_proj.weight.grad[:, heads],
            ):
                scores["kv"][group] += part.abs().sum().item()
        for row in range(40):
            for part in (
                mlp.up_proj.weight[row] * mlp.up_proj.weight.grad[row],
                mlp.gate_proj.weight[row] * mlp.gate_proj.weight.grad[row],
                mlp.down_proj.weight[:, row] * mlp.down_proj.weight.grad[:, row],
            ):
                scores["mlp"][row] += part.abs().sum().item()
        for kind, found in scores.items():
            best = sorted(range(len(found)), key=found.__getitem__)[-len(kept[kind]) :]
            assert kept[kind] == sorted(best), (index, kind)
        assert kept["query"] == [2 * group + head for group in kept["kv"] for head in range(2)]
        widths.append(len(kept["mlp"]))
        groups.append(len(kept["kv"]))
    assert max(widths) - min(widths) <= 1
    assert max(groups) - min(groups) <= 1
    assert max(widths) < 40


@pytest.mark.parametrize("method", ["minitron", "magnitude", "random", "grail"])
def test_uniform_methods_take_the_same_share_of_every_layer(method):
    shapes = layer_shapes(prune(deep(5), method, 0.72).config)
    widths = {shape.mlp_width for shape in shapes}
    heads = {shape.query_heads for shape in shapes}
    assert max(widths) - min(widths) <= 1
    assert max(widths) < 40
    assert len(heads) <= 2  # a unit that falls due at the exact size need not go in all layers


def test_minitron_keeps_as_many_heads_in_each_group_and_ranks_them_there():
    model = deep(3, num_attention_heads=12)
    smaller, scores = prune(model, "minitron", 0.7), []
    for layer in model.model.layers:
        seen = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        model(TOKENS)
        hook.remove()
        norms = seen[0].unflatten(2, (12, 10)).norm(dim=3).mean(dim=1)
        scores.append(norms.square().sum(dim=0).sqrt().tolist())
    lost = 0
    for kept, found in zip(kept_of(model, smaller), scores, strict=True):
        left = len(kept["query"]) // 3
        lost += 4 - left
        best = [
            sorted(sorted(range(4 * group, 4 * group + 4), key=found.__getitem__)[4 - left :])
            for group in range(3)
        ]
        assert kept["query"] == [head for group in best for head in group]
        assert kept["kv"] == [0, 1, 2]
    assert lost >= 3


def opened_model(model):
    return OpenedModel(
        model=LayerwiseModel(model), tokens=TOKENS, micro_batch=4, autocast=False, seed=0, remake=None
    )


def step_for(model, method, share, similarities=None, **others):
    settings = settings_for(PruneSettings(method=method, width_multiple=1, **others), family_of(model.config))
    dense = shape_under(settings, model_shape(model.config), model.config)
    found = measure(model, TOKENS, criterion=settings.criterion, micro_batch=4)
    if similarities is not None:
        found = replace(found, similarities=torch.tensor(similarities))
    step = decision_of(settings, lambda: opened_model(model))(
        StepRequest(
            statistics=found,
            dense=dense,
            current=dense,
            sparsity=(0.0,) * len(dense.layers),
            target_params=round(share * dense.num_params()),
            steps_left=1,
            settings=settings,
        )
    )
    return dense, found, step


@pytest.mark.parametrize("unit", ["kv_group", "query_head", "none"])
@pytest.mark.parametrize("share", [0.85, 0.6, 0.5])
def test_flap_removes_the_lowest_groups_of_the_whole_model_until_the_size_is_met(unit, share):
    share = max(share, 0.7) if unit == "none" else share
    model = deep(5)
    dense, found, step = step_for(model, "flap", share, attention_unit=unit)
    queue = []
    for index, scores in enumerate(found.scores):
        heads = scores.query_heads.tolist()
        if unit == "kv_group":
            units = [(heads[2 * group] + heads[2 * group + 1]) / 2 for group in range(3)]
            cost = dense.kv_head_params + 2 * dense.query_head_params
        elif unit == "query_head":
            lower = [min(heads[2 * group : 2 * group + 2]) for group in range(3)]
            higher = [max(heads[2 * group : 2 * group + 2]) for group in range(3)]
            units, cost = [sum(lower) / 3, sum(higher) / 3], 3 * dense.query_head_params
        else:
            units, cost = [], None
        queue += [(score, cost, index) for score in sorted(units)[:-1]]
        channels = sorted(scores.mlp_channels.tolist())[:-1]
        queue += [(score, dense.mlp_channel_params, index) for score in channels]
    left, lost = dense.num_params() - round(share * dense.num_params()), [[0, 0] for _ in range(5)]
    full = False
    for _, cost, index in sorted(queue):
        full = full or cost > left
        channel = cost == dense.mlp_channel_params
        if (not channel and full) or cost / 2 > left:
            continue
        left -= cost
        lost[index][channel] += 1
    assert abs(left) <= dense.mlp_channel_params / 2
    attention = {"query_head": "heads_per_group"}.get(unit, "kv_heads")
    assert [
        [getattr(whole, attention) - getattr(now, attention), whole.mlp_width - now.mlp_width]
        for whole, now in zip(dense.layers, step.shape.layers, strict=True)
    ] == lost
    assert sum(gone for gone, _ in lost) or share > 0.6
    for plan, scores in zip(step.layers, found.scores, strict=True):
        order = scores.mlp_channels.argsort(descending=True)[: len(plan.mlp_channels)]
        assert sorted(order.tolist()) == list(plan.mlp_channels)


def test_modegpt_shares_are_the_best_of_importance_plus_entropy():
    similarities = [0.55, 0.93, 0.97, 0.88, 0.8]
    best = torch.tensor(shares(similarities, 0.3, 0.1), dtype=torch.float64)
    assert best.mean().item() == pytest.approx(0.3)
    importance = 1 - torch.tensor(similarities, dtype=torch.float64)

    def objective(share):
        return (importance * (1 - share)).sum() - 0.1 * (share * share.log()).sum()

    for seed in range(20):
        other = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = best + 0.001 * (other - other.mean())
        assert objective(moved) < objective(best)
    assert shares(similarities, 0.3, 1e9) == pytest.approx([0.3] * 5)


def test_modegpt_gives_each_layer_its_share_of_channels_and_leaves_attention_whole():
    model = deep(5)
    dense, found, step = step_for(model, "modegpt", 0.8, [0.85, 0.93, 0.95, 0.88, 0.91])
    removed = 0.2 * dense.num_params() / (5 * 40 * dense.mlp_channel_params)
    for now, share in zip(step.shape.layers, shares(found.similarities.tolist(), removed), strict=True):
        assert abs(now.mlp_width - 40 * (1 - share)) <= 1
        assert (now.query_heads, now.kv_heads) == (6, 3)


def test_a_method_decides_its_settings_and_refuses_others():
    applied = PruneSettings(method="grail").applied()
    assert (applied.criterion, applied.repair, applied.repair_ridge) == ("wanda_sp", "ridge_to_zero", 1e-3)
    for ridge in (0.3, 0.1):
        assert PruneSettings(method="grail", repair_ridge=ridge).ridge == ridge
    ridges = {method: PruneSettings(method=method).ridge for method in ("grail", "modegpt", "adapt-pruner")}
    assert ridges == {"grail": 1e-3, "modegpt": 1e-4, "adapt-pruner": 0.1}
    assert PruneSettings(method="flap", repair="bias").applied() == PruneSettings(method="flap").applied()
    assert PruneSettings().applied() == PruneSettings()
    for method in METHODS:
        with pytest.raises(SettingsError) as refused:
            PruneSettings(method=method, criterion="obs", amplitude=0.5, steps_per_phase=3)
        named = [problem.split("=")[0] for problem in refused.value.problems]
        assert named == ["steps_per_phase", "amplitude", "criterion"]
        assert f"method={method}" in str(refused.value)
        stored = PruneSettings(method=method, criterion="taylor_l1")  # the default of older versions
        assert stored.applied() == PruneSettings(method=method).applied()
    with pytest.raises(SettingsError, match="repair=none contradicts method=flap, which decides it: bias"):
        PruneSettings(method="flap", repair="none")


def test_flap_counts_its_biases_in_the_size():
    model = deep(4)
    smaller = prune(model, "flap", 0.8)
    names = {name for name, _ in smaller.named_parameters() if name.endswith("bias")}
    assert names == {
        f"model.layers.{index}.{path}.bias"
        for index in range(4)
        for path in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_a_target_below_what_whole_layers_leave_is_refused():
    with pytest.raises(TargetError, match=r"in each of 9 layers .* and 3 layers left whole"):
        prune(deep(12), "llm-pruner", 0.3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "gemma3"])
def test_shortgpt_without_its_least_important_layers_is_the_model_that_skips_them(family):
    """To the size of whole layers: what stays is bit by bit the model whose other layers do nothing."""
    model = tiny(family)
    shape = model_shape(model.config)
    target = shape.num_params() - shape.layer_num_params(shape.layers[0])
    similarity = measure(model, TOKENS, criterion="magnitude_l2").similarities
    gone = int(similarity.argmax())
    smaller = prune(model, "shortgpt", 0, target_params=target)
    assert smaller.config.num_hidden_layers == 2
    assert sum(p.numel() for p in smaller.parameters()) == target
    layer = model.model.layers[gone]
    layer.forward = lambda hidden_states, **_: hidden_states
    found = smaller(TOKENS).logits
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        assert smaller.config.layer_types == [kind for i, kind in enumerate(kinds) if i != gone]
    assert torch.equal(model(TOKENS).logits, found)


@pytest.mark.parametrize("method", ["shortgpt", "minitron-depth"])
def test_what_whole_layers_leave_to_remove_comes_from_the_mlps_of_the_others(method):
    dense, found, step = step_for(deep(8), method, 0.7)
    gone = [index for index, plan in enumerate(step.layers) if not plan.stays]
    assert len(gone) == int(0.3 * dense.num_params() / dense.layer_num_params(dense.layers[0])) == 2
    if method == "shortgpt":
        assert sorted(gone) == sorted(found.similarities.argsort(descending=True)[:2].tolist())
    else:
        assert gone[1] - gone[0] == 1
    widths = [len(plan.mlp_channels) for plan in step.layers if plan.stays]
    assert max(widths) - min(widths) <= 1
    assert max(widths) < 40
    assert [share == 1 for share in step.sparsity] == [not plan.stays for plan in step.layers]
    for index, plan in enumerate(step.layers):
        if plan.stays:  # by the method's own score
            best = found.scores[index].mlp_channels.argsort(descending=True)[: len(plan.mlp_channels)]
            assert list(plan.mlp_channels) == sorted(best.tolist())


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "gemma3"])
@pytest.mark.parametrize("count", [1, 2])
def test_minitron_takes_the_adjacent_layers_without_which_the_loss_is_lowest(count, family):
    """Against every such model, built by itself and measured by transformers' own loss."""
    model = tiny(family)
    shape, measured = model_shape(model.config), {}
    for first in range(3 - count + 1):
        block = range(first, first + count)
        shallow = prune_model(model, without(block, shape.layers))
        measured[block] = shallow(TOKENS, labels=TOKENS).loss.item()
    gone = min(measured, key=measured.get)
    assert len(measured) == 4 - count
    target = shape.num_params() - count * shape.layer_num_params(shape.layers[0])
    smaller = prune(model, "minitron-depth", 0, target_params=target)
    expected = prune_model(model, without(gone, shape.layers))
    assert smaller.config.num_hidden_layers == 3 - count
    assert torch.equal(smaller(TOKENS).logits, expected(TOKENS).logits)


def without(gone, layers):
    return tuple(
        LayerPlan(
            query_heads=tuple(range(layer.query_heads * stays)),
            kv_heads=tuple(range(layer.kv_heads * stays)),
            mlp_channels=tuple(range(layer.mlp_width * stays)),
        )
        for index, layer in enumerate(layers)
        for stays in [index not in gone]
    )


@pytest.mark.parametrize("order", [1, -1])
def test_minitron_counts_layers_so_that_any_block_of_them_may_go(order):
    shape = model_shape(tiny("llama", UNEQUAL[::order]).config)
    sizes = [shape.layer_num_params(layer) for layer in shape.layers][::order]
    assert sizes[2] < sizes[1] < sizes[0]
    whole = shape.num_params()
    for least, count in [
        (whole - sizes[0] + 1, 0),
        (whole - sizes[0], 1),
        (whole - sizes[0] - sizes[1] + 1, 1),
        (whole - sizes[0] - sizes[1], 2),
        (0, 2),
    ]:
        assert layers_to_go(shape, least) == count
