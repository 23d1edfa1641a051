"""Closed-form repair, against least squares on all activations at once."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.errors import CheckpointError
from core.model.build import load_model, model_shape
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import head_dim
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel, open_streamed
from core.pruning.plan import LayerPlan
from core.pruning.repair import Repair, _Sums
from core.pruning.surgery import prune_checkpoint, prune_model
from tests.pruning.test_surgery import plan_for, without_head_cuts
from tests.support.models import CONFIGS, Float64Throughout, random_tokens, tiny

RIDGE = 0.1
TOKENS = random_tokens(rows=6)

CUT = (
    LayerPlan(query_heads=(0, 1, 4, 5), kv_heads=(0, 2), mlp_channels=(0, 3, 4, 17, 39)),
    LayerPlan(query_heads=(2, 3), kv_heads=(1,), mlp_channels=tuple(range(40))),
    LayerPlan(query_heads=(1, 2, 5), kv_heads=(0, 1, 2), mlp_channels=tuple(range(3, 38))),
)
WHOLE = LayerPlan(query_heads=tuple(range(6)), kv_heads=(0, 1, 2), mlp_channels=tuple(range(40)))


def cut_for(model):
    return CUT if family_of(model.config).prunes_heads else without_head_cuts(CUT)


def columns(model, plan, name):
    if name == "mlp.down_proj":
        return list(plan.mlp_channels)
    size = head_dim(model.config)
    return [head * size + i for head in plan.query_heads for i in range(size)]


def inputs_of(model, layer, name):
    """(tokens, F) inputs of a projection, from a forward pass of the whole model."""
    seen = []
    linear = model.get_submodule(f"{family_of(model.config).layers}.{layer}.{name}")
    hook = linear.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].flatten(0, 1)))
    model(TOKENS)
    hook.remove()
    return linear, seen[0]


@torch.no_grad()
def repaired_by_least_squares(model, plans, *, to_zero=False):
    """The cut model: one projection after the other by ``lstsq`` over stacked activations and ridge rows."""
    errors = []
    for index, plan in enumerate(plans):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            kept = columns(model, plan, name)
            linear, x = inputs_of(model, index, name)
            if len(kept) == x.shape[1]:
                continue
            wanted = linear(x)
            rows, center = x[:, kept], linear.weight[:, kept] * (0 if to_zero else 1)
            unrepaired = wanted - rows @ center.T
            if linear.bias is not None:
                unrepaired = unrepaired - linear.bias
            spread = rows - rows.mean(dim=0) if linear.bias is not None else rows
            squares = spread.square().sum(dim=0)
            squares = (
                squares.mean().expand(len(kept)) if to_zero else squares.clamp_min(squares.median() / 100)
            )
            penalty = (RIDGE * squares).sqrt().diag()
            if linear.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=x.dtype)], dim=1)
                penalty = torch.cat([penalty, torch.zeros(len(kept), 1, dtype=x.dtype)], dim=1)
            right = torch.cat([unrepaired, torch.zeros(len(kept), wanted.shape[1], dtype=x.dtype)])
            change = torch.linalg.lstsq(torch.cat([rows, penalty]), right, driver="gelsd").solution.T
            linear.weight.zero_()
            linear.weight[:, kept] = center + change[:, : len(kept)]
            if linear.bias is not None:
                linear.bias += change[:, -1]
            errors.append((unrepaired.square().sum(), (wanted - linear(x)).square().sum()))
    return prune_model(model, plans), errors


@torch.no_grad()
def repaired(model, plans, **options):
    """The cut model with what ``Repair`` adds."""
    cut = prune_model(model, plans)
    state = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
    repair = Repair(LayerwiseModel(model), TOKENS, ridge=RIDGE, **options)
    for index, plan in enumerate(plans):
        for name, change in repair.layer(index, plan).items():
            state[f"{family_of(model.config).layers}.{index}.{name}"] += change
    cut.load_state_dict(state)
    return cut


def assert_equal(one, other):
    for (name, a), (same, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == same
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_repair_is_least_squares_on_the_activations_of_the_repaired_layers_before(name):
    plans = cut_for(tiny(name))
    with Float64Throughout():
        wanted, errors = repaired_by_least_squares(tiny(name), plans)
        found = repaired(tiny(name), plans, micro_batch=6)
    assert_equal(found, wanted)
    assert all(after < before for before, after in errors)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_in_float32_is_repaired_alike_to_rounding(name):
    wanted, _ = repaired_by_least_squares(tiny(name), CUT)
    found = repaired(tiny(name).float(), CUT)
    for (key, a), b in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key + text)


def test_means_far_above_what_varies_about_them_do_not_drown_it_in_rounding():
    generator = torch.Generator().manual_seed(0)
    x = 1000 * torch.randn(40, generator=generator) + torch.randn(4, 512, 40, generator=generator)
    linear = torch.nn.Linear(40, 8)

    def solved(linear, x):
        sums = _Sums(linear, torch.arange(30), "ridge")
        for part in x:
            sums.add(part[None])
        weight, bias = sums.solve(1e-3)
        return torch.cat([weight, bias[:, None]], dim=1).float()

    found = solved(linear, x)
    torch.testing.assert_close(found, solved(linear.double(), x.double()), rtol=1e-3, atol=1e-3)


def test_an_input_of_a_thousand_times_the_size_leaves_the_others_their_repair():
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(4, 512, 8, generator=generator).double()
        @ torch.randn(8, 40, generator=generator).double()
    )
    linear = torch.nn.Linear(40, 6, bias=False).double().requires_grad_(False)

    def left(x):
        sums = _Sums(linear, torch.arange(30), "ridge")
        sums.add(x)
        change, _ = sums.solve(RIDGE)
        lost = x[..., 30:] @ linear.weight[:, 30:].T
        return float((lost - x[..., :30] @ change.T).norm() / lost.norm())

    large = x.clone()
    large[:, ::128, 0] = 3000.0
    assert left(x) < 0.05
    assert left(large) < 0.05


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("quiet", [1e-2, 1e-4, 1e-8, 1e-26, 0.0])
def test_an_input_that_is_all_but_silent_gets_no_weights_that_drown_other_text(quiet, biased):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(8, 40, generator=generator)
    x, other = (torch.randn(512, 8, generator=generator) @ mixed for _ in range(2))
    x[:, 3] *= quiet
    linear = torch.nn.Linear(40, 6, bias=biased).requires_grad_(False)
    sums = _Sums(linear, torch.arange(30), "ridge")
    sums.add(x[None])
    change, of_bias = sums.solve(RIDGE)

    def left(x):
        lost = x[:, 30:] @ linear.weight[:, 30:].T
        return float((lost - x[:, :30] @ change.T - (of_bias if biased else 0)).norm() / lost.norm())

    assert left(x) < 0.1
    assert left(other) < 0.3


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "gemma2", "phi3"])
def test_a_ridge_to_zero_is_least_squares_without_the_weights_as_they_were(name):
    with Float64Throughout():
        wanted, _ = repaired_by_least_squares(tiny(name), cut_for(tiny(name)), to_zero=True)
        found = repaired(tiny(name), cut_for(tiny(name)), kind="ridge_to_zero")
    assert_equal(found, wanted)


def test_a_strong_ridge_to_zero_of_bfloat16_weights_is_that_of_the_same_weights_in_float32():
    """What it leaves is the small difference of large numbers."""
    left = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny("llama", dtype=torch.bfloat16).to(dtype)
        repair = Repair(LayerwiseModel(model), TOKENS, kind="ridge_to_zero", ridge=100.0)
        weight, kept = model.model.layers[0].mlp.down_proj.weight.detach().double(), CUT[0].mlp_channels
        left.append(weight[:, kept] + repair.layer(0, CUT[0])["mlp.down_proj.weight"])
    assert (left[0] - left[1]).norm() < 0.1 * left[1].norm()


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "phi3"])
@pytest.mark.parametrize("options", [{"micro_batch": 4}, {"micro_batch": 2, "keep_bytes": 10**9}])
@torch.no_grad()
def test_biases_are_the_constants_that_leave_the_least_error_on_the_dense_models_activations(name, options):
    model = tiny(name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with Float64Throughout():
        repair = Repair(LayerwiseModel(model), TOKENS, kind="bias", ridge=RIDGE, **options)
        changes = [repair.layer(index, plan) for index, plan in enumerate(CUT)]
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
        for index, plan in enumerate(CUT):
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                kept = columns(model, plan, path)
                linear, x = inputs_of(model, index, path)
                lost = (x @ linear.weight.T) - x[:, kept] @ linear.weight[:, kept].T
                if len(kept) == x.shape[1]:
                    assert f"{path}.bias" not in changes[index]
                    continue
                constant = torch.linalg.lstsq(torch.ones(len(x), 1, dtype=x.dtype), lost).solution[0]
                torch.testing.assert_close(changes[index].pop(f"{path}.bias"), constant)
    assert changes == [{}, {}, {}]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_biases_are_part_of_the_checkpoint_of_any_family(name, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path / "base", companions=None, provenance={})
    with Float64Throughout():
        repair = Repair(LayerwiseModel(tiny(name)), TOKENS, kind="bias", ridge=RIDGE)
        prune_checkpoint(
            Checkpoint(tmp_path / "base"),
            tmp_path / "small",
            plan_for(model, CUT, "d"),
            digest="d",
            provenance={},
            repair=repair.layer,
            biased=True,
        )
        smaller = load_model(tmp_path / "small")
        again = Repair(LayerwiseModel(tiny(name)), TOKENS, kind="bias", ridge=RIDGE)
        wanted = prune_model(model, CUT, biased=True)
        for index, plan in enumerate(CUT):
            for key, change in again.layer(index, plan).items():
                wanted.get_parameter(f"model.layers.{index}.{key}").data += change
    assert_equal(smaller, wanted)
    shape = model_shape(smaller.config)
    assert shape.num_params() == sum(p.numel() for p in smaller.parameters())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert_equal(stock, smaller)
    assert stock.model.layers[0].mlp.down_proj.bias.abs().sum() > 0


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gemma2", "granite", "phi3"])
def test_micro_batches_and_what_is_kept_change_nothing(name):
    with Float64Throughout():
        at_once = repaired(tiny(name), CUT, micro_batch=6)
        for options in (
            {"micro_batch": 1},
            {"micro_batch": 2, "keep_bytes": 10**9},
            {"micro_batch": 4, "keep_bytes": 40_000},
        ):
            assert_equal(repaired(tiny(name), CUT, **options), at_once)


# What a micro-batch of 2 rows takes: 24 tokens of 40 channels and 48 dimensions, in float64.
A_BATCH = 24 * (40 + 48) * 8


@pytest.mark.parametrize(
    ("keep_bytes", "kept"),
    [(0, 0), (A_BATCH - 1, 0), (A_BATCH, 1), (2 * A_BATCH, 2), (3 * A_BATCH - 1, 2), (3 * A_BATCH, 3)],
)
def test_attention_runs_again_only_where_there_was_no_room_to_keep_it(keep_bytes, kept):
    model, runs = tiny("llama"), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    repair = Repair(LayerwiseModel(model), TOKENS, ridge=RIDGE, micro_batch=2, keep_bytes=keep_bytes)
    repair.layer(0, CUT[0])
    # Up to o_proj, up to down_proj, and through the repaired layer.
    assert len(runs) == 3 + 3 + (3 - kept)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_where_nothing_goes_nothing_changes(name):
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    repair = Repair(LayerwiseModel(model), TOKENS, ridge=RIDGE)
    assert [repair.layer(index, WHOLE) for index in range(3)] == [{}, {}, {}]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_layer_that_loses_nothing_still_hands_on_its_activations():
    plans = (CUT[0], WHOLE, CUT[2])
    with Float64Throughout():
        wanted, _ = repaired_by_least_squares(tiny("llama"), plans)
        assert_equal(repaired(tiny("llama"), plans), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_checkpoint_is_repaired_a_layer_at_a_time(dtype, tmp_path):
    model = tiny("qwen2")
    save_model(model, tmp_path / "base", companions=None, provenance={})
    streamed = open_streamed(Checkpoint(tmp_path / "base"))
    with Float64Throughout():
        prune_checkpoint(
            Checkpoint(tmp_path / "base"),
            tmp_path / "small",
            plan_for(model, CUT, "d"),
            digest="d",
            dtype=dtype,
            provenance={},
            repair=Repair(streamed, TOKENS, ridge=RIDGE).layer,
        )
        wanted = repaired(model, CUT)
    found = load_model(tmp_path / "small")
    assert all(p.is_meta for p in streamed.layers[0].parameters())
    assert model_shape(found.config).num_params() == plan_for(model, CUT, "d").params_after
    if dtype == torch.float64:
        assert_equal(found, wanted)
    else:
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(found.state_dict()[name], wanted.state_dict()[name].to(dtype))


def test_channels_that_are_never_active_stay_as_they_are():
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
    plan = replace(WHOLE, mlp_channels=(1, 2))
    (change,) = Repair(LayerwiseModel(model), TOKENS, ridge=RIDGE).layer(0, plan).values()
    assert torch.equal(change, torch.zeros(48, 2, dtype=torch.float64))


def test_activations_that_are_not_finite_are_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 0] = torch.inf
    repair = Repair(LayerwiseModel(model), TOKENS, ridge=RIDGE)
    with pytest.raises(CheckpointError, match=r"enter mlp\.down_proj of layer 0 are not finite"):
        repair.layer(0, replace(WHOLE, mlp_channels=(1, 2)))


def test_a_ridge_that_rounding_swallows_is_named():
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            linear.weight.copy_(linear.weight[:1] * torch.linspace(0.5, 2, 40)[:, None])
    repair = Repair(LayerwiseModel(model), TOKENS, ridge=1e-12)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj of layer 0 .* Raise prune\.repair_ridge"):
        repair.layer(0, replace(WHOLE, mlp_channels=tuple(range(30))))
