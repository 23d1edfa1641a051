import json
from dataclasses import replace

import pytest
import torch

from core.errors import PlanError
from core.model.build import load_model, model_shape
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import head_dim, layer_shapes
from core.model.families import family_of
from core.model.shape import LayerShape
from core.pruning.plan import LayerPlan, Plan
from core.pruning.surgery import prune_checkpoint, prune_layer, prune_model
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny

KV_GROUPS = (
    LayerPlan(query_heads=(0, 1, 4, 5), kv_heads=(0, 2), mlp_channels=(0, 3, 4, 17, 39)),
    LayerPlan(query_heads=(2, 3), kv_heads=(1,), mlp_channels=tuple(range(40))),
    LayerPlan(query_heads=tuple(range(6)), kv_heads=(0, 1, 2), mlp_channels=(38,)),
)
QUERY_HEADS = (
    LayerPlan(query_heads=(1, 2, 5), kv_heads=(0, 1, 2), mlp_channels=tuple(range(1, 40))),
    *KV_GROUPS[1:],
)


def without_head_cuts(plans):
    """The same plans with all heads kept."""
    return tuple(replace(plan, query_heads=tuple(range(6)), kv_heads=(0, 1, 2)) for plan in plans)


def zero_what_goes(model, plans):
    """Zero the weights that carry a dropped group's output on: it then is as if it were not there."""
    family = family_of(model.config)
    readers = {s.kinds[0]: name for name, s in family.slicings.items() if s.axis == 1}
    assert readers.keys() == {"query", "mlp"}
    head = head_dim(model.config)
    with torch.no_grad():
        for layer, plan, shape in zip(
            model.get_submodule(family.layers), plans, layer_shapes(model.config), strict=True
        ):
            for channel in set(range(shape.mlp_width)) - set(plan.mlp_channels):
                layer.get_parameter(readers["mlp"])[:, channel] = 0
            for dropped in set(range(shape.query_heads)) - set(plan.query_heads):
                layer.get_parameter(readers["query"])[:, dropped * head : dropped * head + head] = 0


def logits_removed_and_zeroed(model, plans):
    tokens = random_tokens()
    with torch.no_grad(), Float64Throughout():
        removed = prune_model(model, plans)(tokens).logits
        zero_what_goes(model, plans)
        return removed, model(tokens).logits


@pytest.mark.parametrize("plans", [KV_GROUPS, QUERY_HEADS], ids=["kv_group", "query_head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_removing_groups_equals_zeroing_them(name, plans):
    model = tiny(name)
    if not family_of(model.config).prunes_heads:
        plans = without_head_cuts(plans)
    removed, zeroed = logits_removed_and_zeroed(model, plans)
    torch.testing.assert_close(removed, zeroed, rtol=0, atol=1e-10)


def test_families_whose_heads_stay_are_those_whose_heads_hang_together():
    for name in CONFIGS:
        removed, zeroed = logits_removed_and_zeroed(tiny(name), KV_GROUPS)
        assert torch.allclose(removed, zeroed) == family_of(tiny(name).config).prunes_heads, name


def test_fused_projections_lose_the_rows_of_each_part():
    model = tiny("phi3")
    layer = {name: p.detach() for name, p in model.model.layers[0].named_parameters()}
    family, shape = family_of(model.config), layer_shapes(model.config)[0]
    pruned = prune_layer(family, shape, layer, KV_GROUPS[0])

    def heads(first, count, kept):
        """Rows of the kept ones of ``count`` heads of size 10, the first of which starts at row ``first``."""
        return [first + head * 10 + i for head in range(count) if head in kept for i in range(10)]

    # 6 query heads, then 3 key heads, then 3 value heads; 40 gate channels, then 40 up channels.
    qkv = heads(0, 6, (0, 1, 4, 5)) + heads(60, 3, (0, 2)) + heads(90, 3, (0, 2))
    assert torch.equal(pruned["self_attn.qkv_proj.weight"], layer["self_attn.qkv_proj.weight"][qkv])
    gate_up = [0, 3, 4, 17, 39, 40, 43, 44, 57, 79]
    assert torch.equal(pruned["mlp.gate_up_proj.weight"], layer["mlp.gate_up_proj.weight"][gate_up])
    assert pruned["input_layernorm.weight"] is layer["input_layernorm.weight"]


def test_norms_of_one_head_stay_whole_and_norms_over_all_heads_are_cut():
    for name, length in (("qwen3", 10), ("gemma3", 10), ("olmo2", 40)):
        layer = prune_model(tiny(name), KV_GROUPS).model.layers[0]
        assert len(layer.self_attn.q_norm.weight) == length


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_model_has_the_planned_sizes(name):
    pruned = prune_model(tiny(name), KV_GROUPS)
    assert layer_shapes(pruned.config) == tuple(plan.shape() for plan in KV_GROUPS)
    assert model_shape(pruned.config).num_params() == sum(p.numel() for p in pruned.parameters())


def plan_for(model, plans, digest):
    after = model_shape(model.config).with_layers(tuple(plan.shape() for plan in plans)).num_params()
    return Plan(
        layers=plans,
        before=layer_shapes(model.config),
        checkpoint=digest,
        statistics="s",
        importance=(0.0,) * 3,
        sparsity=(0.5,) * 3,
        params_before=model_shape(model.config).num_params(),
        params_after=after,
        target_params=after,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_is_pruned_like_the_model_in_memory(name, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path / "base", companions=None, provenance={})
    plan = plan_for(model, KV_GROUPS, "d")
    prune_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "small", plan, digest="d", provenance={})
    expected, found = prune_model(model, KV_GROUPS).state_dict(), load_model(tmp_path / "small").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("said", ["float32", None])
def test_a_pruned_checkpoint_says_the_number_format_of_its_weights(said, tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    save_model(model, tmp_path / "base", companions=None, provenance={})
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": said}))
    plan = plan_for(model, KV_GROUPS, "d")
    for name, dtype in (("bfloat16", None), ("float32", torch.float32)):
        prune_checkpoint(
            Checkpoint(tmp_path / "base"), tmp_path / name, plan, digest="d", dtype=dtype, provenance={}
        )
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name


def test_plans_compose_like_pruning_twice():
    model, tokens = tiny("llama-biased"), random_tokens()
    once = prune_model(model, KV_GROUPS)
    later = (
        LayerPlan(query_heads=(2, 3), kv_heads=(1,), mlp_channels=(1, 2)),
        LayerPlan(query_heads=(1,), kv_heads=(0,), mlp_channels=(7, 30)),
        LayerPlan(query_heads=(0, 1, 2, 3), kv_heads=(0, 1), mlp_channels=(0,)),
    )
    composed = tuple(a.then(b) for a, b in zip(KV_GROUPS, later, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(
            prune_model(model, composed)(tokens).logits, prune_model(once, later)(tokens).logits
        )


def test_a_plan_for_another_checkpoint_is_refused():
    plan = plan_for(tiny("llama"), KV_GROUPS, "d" * 64)
    with pytest.raises(PlanError, match="was made for checkpoint dddddddddddd, not for eeeeeeeeeeee"):
        plan.check("e" * 64, plan.before)


def test_a_plan_applied_twice_is_refused(tmp_path):
    model = tiny("llama")
    plan = plan_for(model, KV_GROUPS, "d")
    save_model(prune_model(model, KV_GROUPS), tmp_path, companions=None, provenance={})
    # Even where the digest is claimed to fit, the sizes do not.
    with pytest.raises(PlanError, match="layer sizes are not the checkpoint's"):
        prune_checkpoint(Checkpoint(tmp_path), tmp_path / "out", plan, digest="d", provenance={})


@pytest.mark.parametrize(
    "bad",
    [
        dict(mlp_channels=(0, 40)),
        dict(mlp_channels=(3, 3)),
        dict(mlp_channels=()),
        dict(kv_heads=(0, 3)),
        dict(query_heads=(0, 1, 2, 5)),  # head 2 would read another KV head than its own
        dict(query_heads=(0, 4, 5)),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_its_layers_is_refused(bad):
    plan = plan_for(tiny("llama"), KV_GROUPS, "d")
    broken = replace(plan, layers=(replace(plan.layers[0], **bad), *plan.layers[1:]))
    with pytest.raises(PlanError, match="layer 0"):
        broken.check("d", plan.before)


def test_a_plan_survives_a_round_trip(tmp_path):
    plan = plan_for(tiny("qwen2"), QUERY_HEADS, "d")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    smallest = replace(plan, before=(LayerShape(query_heads=1, kv_heads=1, mlp_width=1),) * 3)
    smallest.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == smallest
    for changed, problem in (
        ({"before": plan.before[:2]}, "plans 3 of 2 layers"),
        ({"before": (*plan.before[:2], replace(plan.before[2], kv_heads=0))}, "a layer has no groups"),
    ):
        replace(plan, **changed).save(tmp_path / "plan.json")
        with pytest.raises(PlanError, match=problem):
            Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="is damaged: it lacks layers"):
        Plan.load(tmp_path / "plan.json")


def test_what_is_not_cut_is_shared_with_the_larger_model():
    model = tiny("llama")
    smaller = prune_model(model, KV_GROUPS)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in smaller.parameters()}
    # Embedding, head and final norm, and of each layer its norms.
    assert len(shared) == 3 + 3 * 2


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi3"])
def test_unequal_models_are_pruned_again(name):
    plans = (
        LayerPlan(query_heads=(2, 3, 4, 5), kv_heads=(1, 2), mlp_channels=(0, 30)),
        LayerPlan(query_heads=(0, 1), kv_heads=(0,), mlp_channels=(39,)),
        LayerPlan(query_heads=(0, 1, 2, 3, 4), kv_heads=(0,), mlp_channels=(1, 2, 3)),
    )
    removed, zeroed = logits_removed_and_zeroed(tiny(name, UNEQUAL), plans)
    torch.testing.assert_close(removed, zeroed, rtol=0, atol=1e-10)


GONE = LayerPlan(query_heads=(), kv_heads=(), mlp_channels=())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "smollm3"])
def test_a_layer_that_keeps_nothing_is_left_out_of_model_and_checkpoint(name, tmp_path):
    model, plans = tiny(name), (KV_GROUPS[0], GONE, KV_GROUPS[2])
    save_model(model, tmp_path / "base", companions=None, provenance={})
    plan = replace(plan_for(model, KV_GROUPS, "d"), layers=plans)
    prune_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "small", plan, digest="d", provenance={})
    smaller, found = prune_model(model, plans), load_model(tmp_path / "small")
    assert found.config.num_hidden_layers == len(layer_shapes(found.config)) == len(plan.after) == 2
    expected = smaller.state_dict()
    assert expected.keys() == found.state_dict().keys()
    assert all(torch.equal(expected[key], tensor) for key, tensor in found.state_dict().items())
    whole = prune_model(model, KV_GROUPS)
    whole.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    assert torch.equal(whole(random_tokens()).logits, found(random_tokens()).logits)


def test_plans_that_leave_out_layers_compose():
    first = replace(plan_for(tiny("llama"), KV_GROUPS, "d"), layers=(KV_GROUPS[0], GONE, KV_GROUPS[2]))
    last = LayerPlan(query_heads=(0,), kv_heads=(0,), mlp_channels=(0,))
    both = first.then(replace(first, layers=(GONE, last), before=first.after))
    assert both.layers == (GONE, GONE, KV_GROUPS[2].then(last))
    assert both.after == (last.shape(),)
    both.check("d", first.before)
    with pytest.raises(PlanError, match="keeps no layer"):
        replace(first, layers=(GONE,) * 3).check("d", first.before)
