import random
from dataclasses import replace

import pytest
import torch

from core.model.families import FAMILIES
from core.model.shape import LayerShape, ModelShape
from core.pruning.attention import attention_cuts
from core.pruning.planning import settings_for, sizing_for
from core.pruning.scoring.statistics import LayerScores
from core.pruning.sparsity import sizes_at
from core.settings.prune import PruneSettings

DENSE = ModelShape(
    layers=(LayerShape(query_heads=12, kv_heads=6, mlp_width=200),) * 2,
    outside_params=1000,
    layer_params=16,
    query_head_params=60,
    kv_head_params=40,
    mlp_channel_params=24,
)
GROUP = 2 * 60 + 40


def scores(seed, layer, attention=1.0):
    rng = random.Random(seed)
    return LayerScores(
        query_heads=torch.rand(layer.query_heads),
        kv_groups=torch.tensor([attention * rng.random() * GROUP for _ in range(layer.kv_heads)]),
        mlp_channels=torch.tensor([rng.random() * 24 for _ in range(layer.mlp_width)]),
    )


def cheapest_first(layer_scores, layer, budget):
    """Groups of one kind go in order of score; of both kinds the one worth less a parameter goes first."""
    channels = sorted(v / 24 for v in layer_scores.mlp_channels.tolist())
    groups = sorted(v / GROUP for v in layer_scores.kv_groups.tolist())[:-1]
    kv_heads, width = layer.kv_heads, layer.mlp_width
    while True:
        group_is_next = groups and (not channels or groups[0] <= channels[0])
        cost = GROUP if group_is_next else 24
        if cost > budget:
            return kv_heads, width
        budget -= cost
        if group_is_next:
            groups.pop(0)
            kv_heads -= 1
        else:
            channels.pop(0)
            width -= 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("gone", [(0, 0), (2, 30)], ids=["dense", "pruned before"])
def test_auto_takes_what_is_worth_least_a_parameter(seed, gone):
    rng = random.Random(seed)
    now = LayerShape(query_heads=12 - 2 * gone[0], kv_heads=6 - gone[0], mlp_width=200 - gone[1])
    current = DENSE.with_layers((now, now))
    found = tuple(scores(seed + i, now) for i in range(2))
    sizing = sizing_for(PruneSettings(attention_unit="auto", width_multiple=1), DENSE, current, found)
    prunable = DENSE.prunable_params(DENSE.layers[0])
    lost = prunable - DENSE.prunable_params(now)
    for index in range(2):
        budget = rng.uniform(0.1, 0.6) * (prunable - lost)
        layer = sizes_at(sizing, ((lost + budget) / prunable,) * 2)[index]
        kv_heads, width = cheapest_first(found[index], now, budget)
        # A group that the budget has just no room for leaves its place to channels worth more.
        if layer.kv_heads == kv_heads:
            assert abs(layer.mlp_width - width) <= GROUP / 24 + 1
        else:
            assert layer.kv_heads == kv_heads + 1
        assert layer.query_heads == 2 * layer.kv_heads
        assert abs(lost + budget - (prunable - DENSE.prunable_params(layer))) <= 12  # half a channel


def test_attention_that_is_worth_more_stays_whole_and_worthless_attention_goes_first():
    dear = tuple(scores(i, DENSE.layers[0], attention=100.0) for i in range(2))
    cheap = tuple(scores(i, DENSE.layers[0], attention=1e-9) for i in range(2))
    settings = PruneSettings(attention_unit="auto", width_multiple=1)
    for found, kv_heads in ((dear, 6), (cheap, 1)):
        layer = sizes_at(sizing_for(settings, DENSE, DENSE, found), (0.3, 0.3))[0]
        assert layer.kv_heads == kv_heads


def test_without_scores_auto_stands_for_all_that_could_go():
    cuts = attention_cuts("auto", DENSE, DENSE)
    assert [(cut.unit, len(cut.due)) for cut in cuts] == [("kv_group", 5)] * 2
    assert attention_cuts("none", DENSE, DENSE)[0].due == ()


def test_one_kv_head_is_never_taken():
    single = DENSE.with_layers((LayerShape(query_heads=12, kv_heads=1, mlp_width=200),) * 2)
    found = tuple(scores(i, single.layers[0], attention=0.0) for i in range(2))
    assert all(cut.due == () for cut in attention_cuts("auto", single, single, found))


def test_auto_leaves_attention_whole_where_no_head_can_go():
    olmo = FAMILIES["olmo2"]
    assert settings_for(PruneSettings(attention_unit="auto"), olmo).attention_unit == "none"
    assert settings_for(PruneSettings(attention_unit="auto"), FAMILIES["llama"]).attention_unit == "auto"


@pytest.mark.parametrize(("asked", "multiple"), [(32, 256), (256, 256), (512, 512)])
def test_the_portable_profile_leaves_attention_whole_and_cuts_widths_to_multiples_of_256(asked, multiple):
    settings = PruneSettings(profile="portable", width_multiple=asked)
    applied = settings_for(settings, FAMILIES["llama"])
    assert (applied.attention_unit, applied.width_multiple) == ("none", multiple)
    assert sizing_for(applied, DENSE, DENSE).width_multiple == multiple


def test_units_that_went_before_are_not_due_again():
    now = replace(DENSE.layers[0], query_heads=8, kv_heads=4)
    cuts = attention_cuts("kv_group", DENSE, DENSE.with_layers((now, now)))
    assert cuts[0].due == pytest.approx((3 / 6, 4 / 6, 5 / 6))
    whole = replace(DENSE.layers[0], kv_heads=3)
    cuts = attention_cuts("query_head", DENSE.with_layers((whole,)), DENSE.with_layers((whole,)))
    assert cuts[0].due == pytest.approx((1 / 4, 2 / 4, 3 / 4))
    now = replace(whole, query_heads=9)
    (cut,) = attention_cuts("query_head", DENSE.with_layers((whole,)), DENSE.with_layers((now,)))
    assert (cut.unit, cut.due) == ("query_head", pytest.approx((2 / 4, 3 / 4)))


def test_a_query_head_with_a_kv_head_of_its_own_goes_with_it():
    alone = replace(DENSE.layers[0], query_heads=6)
    cuts = attention_cuts("query_head", DENSE.with_layers((alone,)), DENSE.with_layers((alone,)))
    assert cuts == attention_cuts("kv_group", DENSE.with_layers((alone,)), DENSE.with_layers((alone,)))
    assert len(cuts[0].due) == 5
