"""One step's and one phase's decisions, against what the sizes that they lead to say."""

import random
from dataclasses import replace

import pytest

from core.errors import TargetError
from core.model.families import FAMILIES
from core.pruning.methods.llm_pruner import whole_layers
from core.pruning.planning import StepRequest, plan_phase, plan_step, settings_for, sizing_for
from core.pruning.sparsity import MAX_SPARSITY, next_sparsity, normalise_importance, sizes_for_target
from core.settings.prune import PruneSettings
from tests.pruning.test_sparsity import statistics_of, uniform_shape

EVENLY = PruneSettings(attention_unit="none", amplitude=0, width_multiple=1)


@pytest.mark.parametrize("steps_left", [2, 3, 5])
def test_a_step_takes_an_equal_share_of_what_is_left_to_remove(steps_left):
    dense = uniform_shape(6, 3, 2, 200, 16)
    target = round(0.6 * dense.num_params())
    step = plan_step(
        StepRequest(
            statistics=statistics_of(dense, 0),
            dense=dense,
            current=dense,
            sparsity=(0.0,) * 6,
            target_params=target,
            steps_left=steps_left,
            settings=EVENLY,
        )
    )
    wanted = (dense.num_params() - target) / steps_left
    removed = dense.num_params() - step.shape.num_params()
    assert abs(removed - wanted) <= 6 * dense.mlp_channel_params / 2
    channels = 6 * 200 * dense.mlp_channel_params
    assert step.sparsity == pytest.approx([wanted / channels] * 6)


@pytest.mark.parametrize("amplitude", [0, 0.01])
def test_the_sparsity_that_a_step_leaves_is_that_of_the_widths(amplitude):
    """Also where the last step's sparsity is shifted to land on the target, phase after phase."""
    rng = random.Random(amplitude)
    for seed in range(20):
        width = rng.randint(100, 300)
        dense = uniform_shape(rng.randint(2, 8), 3, 2, width, 16)
        current, sparsity = dense, (0.0,) * len(dense.layers)
        settings = PruneSettings(attention_unit="none", amplitude=amplitude, width_multiple=1)
        for number, share in enumerate((0.9, 0.8, 0.75)):
            step = plan_step(
                StepRequest(
                    statistics=statistics_of(current, seed + 100 * number),
                    dense=dense,
                    current=current,
                    sparsity=sparsity,
                    target_params=round(share * dense.num_params()),
                    steps_left=1 + (number == 1),
                    settings=settings,
                )
            )
            layers = zip(current.layers, step.shape.layers, step.sparsity, strict=True)
            for before, after, layer_sparsity in layers:
                assert 0 <= layer_sparsity <= MAX_SPARSITY
                if after.mlp_width < before.mlp_width:  # no layer grows back, whatever its sparsity
                    assert abs(width * (1 - layer_sparsity) - after.mlp_width) <= 1
            current, sparsity = step.shape, step.sparsity


@pytest.mark.parametrize("multiple", [1, 8])
def test_widths_are_rounded_by_largest_remainder(multiple):
    """No width moves by a whole multiple, and none is rounded down past a smaller remainder's rounded up."""
    rng = random.Random(multiple)
    rounded = {"up": 0, "down": 0}
    for _ in range(100):
        dense = uniform_shape(rng.randint(2, 9), 3, 2, multiple * rng.randint(20, 60), 16)
        sizing = sizing_for(replace(EVENLY, width_multiple=multiple), dense, dense)
        importance = normalise_importance([rng.random() for _ in dense.layers])
        target = round(rng.uniform(0.6, 0.95) * dense.num_params())
        due = (dense.num_params() - target) / sizing.prunable_params()
        sparsity = next_sparsity((0.0,) * len(dense.layers), importance, step=due, amplitude=0.002)
        layers, shift = sizes_for_target(sizing, sparsity, importance, target)
        up, down = [1.0], [0.0]
        for layer, whole, share in zip(layers, dense.layers, sparsity, strict=True):
            exact = whole.mlp_width * (1 - share - shift) / multiple
            remainder = exact % 1
            assert abs(layer.mlp_width / multiple - exact) < 1
            (up if layer.mlp_width / multiple > exact else down).append(remainder)
        assert min(up) >= max(down) - 1e-6
        rounded["up"] += len(up) - 1
        rounded["down"] += len(down) - 1
    assert min(rounded.values()) > 100


def test_a_phase_ends_with_the_step_that_lands_on_its_target():
    """A quarter of a channel, then a third more: that rounds to a whole one, and nothing is left to do."""
    dense = uniform_shape(1, 1, 1, 10, 16)
    measured = []

    def remeasure(layers, number):
        measured.append(number)
        return statistics_of(dense, number)

    plan = plan_phase(
        statistics_of(dense, 0),
        dense=dense,
        current=dense,
        sparsity=(0.0,),
        target_params=dense.num_params() - dense.mlp_channel_params,
        settings=PruneSettings(attention_unit="none", amplitude=0, width_multiple=1, steps_per_phase=4),
        checkpoint="c",
        statistics_digest="s",
        remeasure=remeasure,
    )
    assert plan.params_after == plan.target_params
    assert measured == [1]


def test_a_phase_that_misses_its_target_says_so(caplog):
    """Where a unit of attention has more parameters than the MLPs have left; never otherwise."""
    missed = {True: 0, False: 0}
    for seed in range(150):
        rng = random.Random(seed)
        dense = uniform_shape(rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4), rng.randint(2, 20), 16)
        caplog.clear()
        try:
            plan = plan_phase(
                statistics_of(dense, 0),
                dense=dense,
                current=dense,
                sparsity=(0.0,) * len(dense.layers),
                target_params=round(rng.uniform(0.5, 0.97) * dense.num_params()),
                settings=PruneSettings(attention_unit="kv_group", width_multiple=1, steps_per_phase=1),
                checkpoint="c",
                statistics_digest="s",
                remeasure=lambda *_: pytest.fail("one step measures once"),
            )
        except TargetError:
            continue
        by = abs(plan.params_after - plan.target_params)
        said = f"{by:,} from its target" in caplog.text
        assert said == bool(caplog.text) == (by > dense.mlp_channel_params / 2)
        missed[said] += 1
    assert min(missed.values()) >= 5


@pytest.mark.parametrize(
    ("criterion", "unit"),
    [
        ("taylor_l1", "auto"),
        ("taylor_signed", "auto"),
        ("fisher", "kv_group"),
        ("fisher_per_token", "auto"),
        ("wanda_sp", "kv_group"),
        ("magnitude_l1", "kv_group"),
    ],
)
def test_attention_competes_with_the_mlp_only_where_scores_estimate_the_loss(criterion, unit):
    asked = PruneSettings(attention_unit="auto", criterion=criterion)
    assert settings_for(asked, FAMILIES["llama"]).attention_unit == unit
    assert settings_for(asked, FAMILIES["olmo2"]).attention_unit == "none"


def test_layers_that_a_method_leaves_whole_have_no_sparsity():
    dense = uniform_shape(12, 2, 2, 40, 16)
    plan = plan_phase(
        statistics_of(dense, 0),
        dense=dense,
        current=dense,
        sparsity=(0.0,) * 12,
        target_params=round(0.8 * dense.num_params()),
        settings=settings_for(PruneSettings(method="llm-pruner", width_multiple=1), FAMILIES["llama"]),
        checkpoint="c",
        statistics_digest="s",
        remeasure=lambda *_: pytest.fail("one step measures once"),
    )
    assert [layer for layer, sparsity in enumerate(plan.sparsity) if not sparsity] == [*whole_layers(12)]
    assert all(plan.layers[layer].shape() == dense.layers[layer] for layer in whole_layers(12))
