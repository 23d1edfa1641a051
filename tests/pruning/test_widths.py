"""The rules of prune.widths against loops, brute force, and models that are really cut."""

import itertools
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch.nn.functional import kl_div

from core.errors import CheckpointError, SettingsError
from core.model.build import model_shape
from core.model.config import layer_shapes
from core.pruning.plan import select_groups
from core.pruning.planning import StepRequest, plan_step
from core.pruning.scoring.calibration import measure
from core.pruning.surgery import prune_model
from core.pruning.widths import search as searching
from core.pruning.widths.divergence import CutDivergence
from core.pruning.widths.importance import layer_importance
from core.pruning.widths.quadratic import cheapest, parabola
from core.pruning.widths.search import WidthSearch
from core.settings.prune import PruneSettings
from tests.pruning.test_sparsity import statistics_of, uniform_shape
from tests.support.models import UNEQUAL, random_tokens, tiny

TOKENS = random_tokens(rows=5)


def deviations(values):
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def scaled(values):
    largest = max(abs(value) for value in values)
    return [value / largest for value in values]


def test_importance_by_each_rule_against_loops():
    rng = random.Random(1)
    for count in (3, 4, 9):
        values = [rng.random() for _ in range(count)]
        values[1] = 30.0  # an outlier
        similarities = [-value for value in values]
        assert layer_importance(similarities) == pytest.approx(scaled(deviations(values)))
        places = [sum(other < value for other in values) for value in values]
        assert layer_importance(similarities, "ranks") == pytest.approx(scaled(deviations(places)))
        middle = torch.tensor(values, dtype=torch.float64).quantile(0.5).item()
        away = (
            torch.tensor([abs(value - middle) for value in values], dtype=torch.float64).quantile(0.5).item()
        )
        clipped = [min(max(value, middle - 2 * away), middle + 2 * away) for value in values]
        found = layer_importance(similarities, "clipped")
        assert found == pytest.approx(scaled(deviations(clipped)))
        assert layer_importance(similarities, "search") == layer_importance(similarities, "softmax")
        # The outlier leaves the others hardly any spread, but not where it is clipped.
        others = [[x for i, x in enumerate(of) if i != 1] for of in (layer_importance(similarities), found)]
        assert max(others[1]) - min(others[1]) > 5 * (max(others[0]) - min(others[0]))


@pytest.mark.parametrize("rule", ["similarity", "ranks", "clipped"])
def test_layers_that_are_alike_have_no_importance(rule):
    assert layer_importance([0.9, 0.9 + 1e-15, 0.9], rule) == (0, 0, 0)


def test_equal_layers_share_a_rank_and_mostly_equal_ones_are_not_clipped():
    assert layer_importance([0.5, 0.5, 0.1], "ranks") == pytest.approx([-0.5, -0.5, 1])
    assert layer_importance([0.5, 0.5, 0.5, 0.1], "clipped") == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1])


@pytest.mark.parametrize("rule", ["similarity", "ranks", "clipped", "softmax"])
@pytest.mark.parametrize("unit", ["none", "kv_group", "auto"])
def test_every_rule_meets_the_size_over_two_phases(rule, unit):
    dense = uniform_shape(6, 3, 2, 200, 16)
    settings = PruneSettings(widths=rule, attention_unit=unit, amplitude=0.01, width_multiple=4)
    current, sparsity = dense, (0.0,) * 6
    for phase, share in enumerate((0.9, 0.75)):
        target = round(share * dense.num_params())
        step = plan_step(
            StepRequest(
                statistics=statistics_of(current, phase),
                dense=dense,
                current=current,
                sparsity=sparsity,
                target_params=target,
                steps_left=1,
                settings=settings,
            )
        )
        assert abs(step.shape.num_params() - target) <= 4 * dense.mlp_channel_params / 2
        current, sparsity = step.shape, step.sparsity


def test_softmax_takes_shares_of_attention_and_mlp_alike():
    dense = uniform_shape(4, 3, 2, 200, 16)
    found = replace(statistics_of(dense, 3), similarities=torch.tensor([0.6, 0.7, 0.65, 0.72]))
    settings = PruneSettings(widths="softmax", attention_unit="auto", amplitude=0.5, width_multiple=1)
    target = round(0.8 * dense.num_params())
    step = plan_step(
        StepRequest(
            statistics=found,
            dense=dense,
            current=dense,
            sparsity=(0.0,) * 4,
            target_params=target,
            steps_left=1,
            settings=settings,
        )
    )
    weights = torch.softmax(found.similarities.double() / 0.1, dim=0)
    prunable = sum(map(dense.prunable_params, dense.layers))
    wanted = 4 * weights * (dense.num_params() - target) / prunable
    for layer, share in zip(step.shape.layers, wanted.tolist(), strict=True):
        left = dense.prunable_params(layer) / dense.prunable_params(dense.layers[0])
        assert left == pytest.approx(1 - share, abs=2 * dense.mlp_channel_params / prunable * 4)


def test_the_parabola_goes_through_its_points():
    for points in ([(3, 0.5), (-2, 0.7)], [(-4, 1.5), (1, -0.2)]):
        slope, curvature = parabola(points)
        for change, cost in points:
            assert slope * change + curvature * change**2 / 2 == pytest.approx(cost)
    assert parabola([(-4, 2.0)]) == (-0.5, 0)
    assert parabola([]) == (0, 0)


def test_the_cheapest_changes_against_brute_force():
    rng = random.Random(2)
    for _ in range(30):
        slopes = [rng.uniform(-1, 1) for _ in range(4)]
        curvatures = [rng.uniform(0.05, 0.6) for _ in range(4)]
        low, high = [-rng.randint(0, 4) for _ in range(4)], [rng.randint(0, 4) for _ in range(4)]
        total = rng.randint(sum(low), sum(high))

        def cost(changes, g=slopes, h=curvatures):
            return sum(a * d + b * d * d / 2 for a, b, d in zip(g, h, changes, strict=True))

        found = cheapest(slopes, curvatures, low, high, total)
        assert sum(found) == pytest.approx(total, abs=1e-9)
        assert all(a - 1e-9 <= d <= b + 1e-9 for a, d, b in zip(low, found, high, strict=True))
        steps = [range(a, b + 1) for a, b in zip(low, high, strict=True)]
        grid = [c for c in itertools.product(*steps) if sum(c) == total]
        best = min(map(cost, grid))
        assert cost(found) <= best + 1e-9
        # And no shift of a little from one layer to another is better.
        for i, j in itertools.permutations(range(4), 2):
            moved = list(found)
            moved[i], moved[j] = moved[i] + 1e-4, moved[j] - 1e-4
            if moved[i] <= high[i] and moved[j] >= low[j]:
                assert cost(moved) >= cost(found) - 1e-9
    assert cheapest([0.0], [1.0], [-1.0], [1.0], 7.0) == [1.0]


def divergence(model, smaller, tokens=TOKENS):
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=of(tokens).logits) for of in (model, smaller))
    return torch.distributions.kl_divergence(p, q).mean().item()


def scored(model):
    return measure(model, random_tokens(seed=5), criterion="wanda_sp", micro_batch=2)


def cut_to(model, statistics, sizes):
    return [
        select_groups(scores, now, after)
        for scores, now, after in zip(statistics.scores, layer_shapes(model.config), sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "layers", "units"),
    [
        ("llama-tied", UNEQUAL, "kv"),
        ("qwen2", None, "kv"),
        ("gemma2", None, "query"),
        ("qwen2", UNEQUAL, "query"),
    ],
)
def test_a_masked_cut_is_as_far_away_as_the_model_that_is_really_cut(name, layers, units):
    model = tiny(name, layers)
    statistics, shapes = scored(model), layer_shapes(model.config)

    def smaller(shape, channels):
        shape = replace(shape, mlp_width=shape.mlp_width - channels)
        if units == "query" and shape.heads_per_group > 1:
            return replace(shape, query_heads=shape.kv_heads * (shape.heads_per_group - 1))
        if units == "kv" and shape.kv_heads > 1:
            return replace(
                shape, kv_heads=shape.kv_heads - 1, query_heads=shape.query_heads - shape.heads_per_group
            )
        return shape

    cuts = [cut_to(model, statistics, [smaller(shape, n) for shape in shapes]) for n in (2, 5)]
    measured = CutDivergence(model, TOKENS, batch_size=2)
    assert measured.of([cut_to(model, statistics, shapes)]) == [0]
    wanted = [divergence(model, prune_model(model, tuple(cut))) for cut in cuts]
    assert measured.of(cuts) == pytest.approx(wanted, rel=1e-6)
    assert min(wanted) > 1e-5
    changes = [(index, cuts[1][index]) for index in (2, 0, 1)]
    wanted = [
        divergence(model, prune_model(model, (*cuts[0][:i], plan, *cuts[0][i + 1 :]))) for i, plan in changes
    ]
    assert measured.with_one_layer_changed(cuts[0], changes) == pytest.approx(wanted, rel=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("every", "length"), [(4, 12), (4, 10), (16, 10)])
def test_a_divergence_at_some_positions_is_the_mean_over_these(every, length):
    model = tiny("llama")
    shapes = layer_shapes(model.config)
    cut = cut_to(model, scored(model), [replace(shape, mlp_width=shape.mlp_width - 5) for shape in shapes])
    tokens = TOKENS.flatten()[: 2 * length].view(2, length)
    smaller, found = prune_model(model, tuple(cut)), []
    for row in tokens:
        for end in range(min(every, length), length + 1, every):
            logits, wanted = (of(row[None, :end]).logits[0, -1].detach().double() for of in (smaller, model))
            found.append(
                kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
            )
    (measured,) = CutDivergence(model, tokens, batch_size=1, every=every).of([cut])
    assert measured == pytest.approx(fmean(map(float, found)), rel=1e-4)


def test_a_divergence_that_is_not_a_number_is_refused():
    model = tiny("llama")
    statistics, shapes = scored(model), layer_shapes(model.config)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="divergence is not a number"):
        CutDivergence(model, TOKENS, batch_size=5).of([cut_to(model, statistics, shapes)])


def lopsided():
    """Return a model whose first MLP matters much more than the layers' similarities say."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(6)
        model.model.layers[2].mlp.down_proj.weight.mul_(0.05)
    return model


@pytest.mark.parametrize("unit", ["none", "kv_group", "query_head", "auto"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_search_meets_the_size_and_never_gets_farther_away(unit, multiple, monkeypatch):
    monkeypatch.setattr(searching, "MEASURED_EVERY", 1)
    model = lopsided()
    dense, statistics = model_shape(model.config), scored(model)
    settings = PruneSettings(
        widths="search", steps_per_phase=1, attention_unit=unit, width_multiple=multiple, criterion="wanda_sp"
    )
    given = dict(
        dense=dense,
        current=dense,
        sparsity=(0.0,) * 3,
        target_params=round(0.85 * dense.num_params()),
        steps_left=1,
        settings=settings,
    )
    start = plan_step(StepRequest(statistics=statistics, **given))
    values = [divergence(model, prune_model(model, start.layers))]
    for sweeps in (1, 2):
        search = WidthSearch(model, TOKENS, batch_size=2, sweeps=sweeps)
        step = search.step(StepRequest(statistics=statistics, **given))
        assert step == search.step(StepRequest(statistics=statistics, **given)), "deterministic"
        assert step.shape.layers == tuple(plan.shape() for plan in step.layers)
        assert (
            abs(step.shape.num_params() - given["target_params"]) <= multiple * dense.mlp_channel_params / 2
        )
        assert all(layer.mlp_width % multiple == 0 for layer in step.shape.layers)
        assert list(step.layers) == cut_to(model, statistics, step.shape.layers)
        values.append(divergence(model, prune_model(model, step.layers)))
        for layer, sparsity in zip(step.shape.layers, step.sparsity, strict=True):
            left = layer.mlp_width / 40
            if unit == "auto":
                left = dense.prunable_params(layer) / dense.prunable_params(dense.layers[0])
            assert left == pytest.approx(1 - sparsity)
            assert unit != "none" or (layer.query_heads, layer.kv_heads) == (6, 3)
    assert values[0] >= values[1] >= values[2]
    assert multiple > 1 or values[1] < values[0]


def test_the_search_finds_what_brute_force_finds(monkeypatch):
    """Costs that are separable parabolas of the widths: one sweep of them finds the best widths."""
    model = tiny("llama")
    dense, statistics = model_shape(model.config), scored(model)
    best = (37, 22, 31)

    class Parabolas:
        def __init__(self, *_, **__):
            self.asked = 0

        def of(self, cuts):
            self.asked += len(cuts)
            return [
                sum((len(plan.mlp_channels) - b) ** 2 for plan, b in zip(cut, best, strict=True))
                for cut in cuts
            ]

        def with_one_layer_changed(self, cut, changes):
            return self.of([[*cut[:i], plan, *cut[i + 1 :]] for i, plan in changes])

    monkeypatch.setattr(searching, "CutDivergence", Parabolas)
    settings = PruneSettings(
        widths="search", steps_per_phase=1, attention_unit="none", width_multiple=1, amplitude=0
    )
    removed = sum(40 - b for b in best) * dense.mlp_channel_params
    search = WidthSearch(model, TOKENS, batch_size=2, sweeps=4)
    step = search.step(
        StepRequest(
            statistics=statistics,
            dense=dense,
            current=dense,
            sparsity=(0.0,) * 3,
            target_params=dense.num_params() - removed,
            steps_left=1,
            settings=settings,
        )
    )
    assert tuple(layer.mlp_width for layer in step.shape.layers) == best


def test_no_unit_goes_that_the_widths_cannot_make_up_for(monkeypatch):
    model = tiny("llama")
    dense, statistics = model_shape(model.config), scored(model)

    class FewerHeads:
        """The fewer heads, the closer."""

        def __init__(self, *_, **__):
            pass

        def of(self, cuts):
            return [sum(len(plan.query_heads) for plan in cut) for cut in cuts]

        def with_one_layer_changed(self, cut, changes):
            return self.of([[*cut[:i], plan, *cut[i + 1 :]] for i, plan in changes])

    monkeypatch.setattr(searching, "CutDivergence", FewerHeads)
    settings = PruneSettings(widths="search", steps_per_phase=1, attention_unit="kv_group", width_multiple=1)
    for channels in (5, 45):
        target = dense.num_params() - channels * dense.mlp_channel_params
        step = WidthSearch(model, TOKENS, batch_size=2, sweeps=1).step(
            StepRequest(
                statistics=statistics,
                dense=dense,
                current=dense,
                sparsity=(0.0,) * 3,
                target_params=target,
                steps_left=1,
                settings=settings,
            )
        )
        assert abs(step.shape.num_params() - target) <= dense.mlp_channel_params / 2
        heads = sum(layer.query_heads for layer in step.shape.layers)
        assert (heads < 18) == (channels == 45)


def test_a_model_of_the_size_is_left_as_it_is():
    model = tiny("llama")
    dense = model_shape(model.config)
    step = WidthSearch(model, TOKENS, batch_size=5).step(
        StepRequest(
            statistics=scored(model),
            dense=dense,
            current=dense,
            sparsity=(0.0,) * 3,
            target_params=dense.num_params(),
            steps_left=1,
            settings=PruneSettings(widths="search", steps_per_phase=1),
        )
    )
    assert step.shape == dense


def test_a_search_takes_one_step_and_methods_refuse_other_rules():
    for steps in (0, 3):
        with pytest.raises(SettingsError, match=f"steps_per_phase={steps}, but widths=search"):
            PruneSettings(widths="search", steps_per_phase=steps)
    PruneSettings(widths="search", steps_per_phase=1)
    with pytest.raises(SettingsError, match="widths=search contradicts method=flap"):
        PruneSettings(method="flap", widths="search")
    assert PruneSettings(method="modegpt").applied().widths == "softmax"
