import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, cross_entropy

from core.errors import CheckpointError, DataError, PlanError
from core.model.config import layer_shapes
from core.pruning.scoring.calibration import draw_calibration, layer_similarity, measure
from core.pruning.scoring.criteria import CRITERIA
from core.pruning.scoring.statistics import LayerScores, Statistics
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny

TOKENS = random_tokens(rows=7)  # three micro-batches of 3, 3 and 1


def loss_of(model, tokens=TOKENS):
    """The calibration loss, plainly: the mean over all predictions."""
    logits = model(tokens).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def assert_same_scores(found, expected, **tolerance):
    for kind in ("query_heads", "kv_groups", "mlp_channels"):
        torch.testing.assert_close(getattr(found, kind), getattr(expected, kind), **tolerance)


def plain_scores(config, layer, shape):
    """sum |W * dL/dW| of each group of a layer, row by row, from nothing but the names of its projections."""
    size, heads, kv_heads = config.head_dim, shape.query_heads, shape.kv_heads
    query, kv, mlp = [0.0] * heads, [0.0] * kv_heads, [0.0] * shape.mlp_width
    for name, parameter in layer.named_parameters():
        projection, _, what = name.split(".", 1)[-1].partition(".")
        terms = (parameter * parameter.grad).abs()
        if projection in ("o_proj", "down_proj"):
            if what == "bias":
                continue  # added once, whatever feeds the projection
            terms = terms.T
        for row, value in enumerate(
            terms.flatten(1).sum(dim=1).tolist() if terms.dim() > 1 else terms.tolist()
        ):
            if projection in ("q_proj", "o_proj") or (projection == "qkv_proj" and row < heads * size):
                query[row // size] += value
            elif projection in ("k_proj", "v_proj"):
                kv[row // size] += value
            elif projection == "qkv_proj":
                kv[(row // size - heads) % kv_heads] += value
            elif projection in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
                mlp[row % shape.mlp_width] += value
            elif config.model_type == "olmo2" and projection == "q_norm":  # over all heads, not over each
                query[row // size] += value
            elif config.model_type == "olmo2" and projection == "k_norm":
                kv[row // size] += value
    # Query head h reads KV head h // n_rep.
    per_group = heads // kv_heads
    groups = [kv[j] + sum(query[j * per_group : (j + 1) * per_group]) for j in range(kv_heads)]
    return LayerScores(
        query_heads=torch.tensor(query, dtype=torch.float64),
        kv_groups=torch.tensor(groups, dtype=torch.float64),
        mlp_channels=torch.tensor(mlp, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", [None, UNEQUAL], ids=["equal", "unequal"])
def test_streamed_scores_equal_autograds(name, layers):
    model = tiny(name, layers)
    measured = measure(model, TOKENS, micro_batch=3)
    model.requires_grad_(True)
    loss = loss_of(model)
    loss.backward()
    assert measured.loss == pytest.approx(loss.item(), abs=1e-12)
    for layer, shape, scores in zip(
        model.model.layers, layer_shapes(model.config), measured.scores, strict=True
    ):
        assert_same_scores(scores, plain_scores(model.config, layer, shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "taylor_per_microbatch"])
def test_no_split_into_micro_batches_changes_a_score(criterion):
    """Seven sequences: one micro-batch of 7, two of 5 and 2, three of 3, 3 and 1, seven of 1."""
    # What is standardised is of the order of 1, and adds up to nothing but rounding.
    atol = 1e-13 if criterion == "standardised_fluctuation" else 1e-15
    with Float64Throughout():
        model = tiny("llama", UNEQUAL)
        whole, *others = (
            measure(model, TOKENS, micro_batch=size, criterion=criterion) for size in (7, 5, 3, 1)
        )
    for other in others:
        assert other.loss == pytest.approx(whole.loss, rel=1e-12)
        torch.testing.assert_close(other.similarities, whole.similarities, rtol=1e-6, atol=0)  # float32
        for found, expected in zip(other.scores, whole.scores, strict=True):
            assert_same_scores(found, expected, rtol=1e-12, atol=atol)


def in_float64_throughout(model):
    """The model with norms that do not round to float32 on the way, as transformers' own do."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: (
                m.weight * x * (x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
            )
    return model


def test_a_channels_score_agrees_with_finite_differences_of_the_loss():
    model = in_float64_throughout(tiny("llama"))
    score = measure(model, TOKENS, micro_batch=7).scores[2].mlp_channels[5].item()
    mlp = model.model.layers[2].mlp
    places = [(m.weight, 5, d) for m in (mlp.gate_proj, mlp.up_proj) for d in range(48)]
    places += [(mlp.down_proj.weight, d, 5) for d in range(48)]
    expected, step = 0.0, 1e-5
    with torch.no_grad():
        for weight, row, column in places:
            value = weight[row, column].item()
            weight[row, column] = value + step
            up = loss_of(model)
            weight[row, column] = value - step
            down = loss_of(model)
            weight[row, column] = value
            expected += abs(value * (up - down).item() / (2 * step))
    assert score == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "euclidean", "manhattan"])
def test_similarities_equal_a_loop_over_tokens(kind):
    model = tiny("qwen2", UNEQUAL)
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: states.append((args[0], output)))
    measured = measure(model, TOKENS, micro_batch=3, similarity=kind)
    states.clear()
    with torch.no_grad():
        model(TOKENS)
    for index, (x, y) in enumerate(states):
        values = []
        for row in range(7):
            for token in range(12):
                a, b = x[row, token], y[row, token]
                if kind == "cosine":
                    values.append((a @ b / (a.norm() * b.norm())).item())
                else:
                    values.append(-((b - a).norm() if kind == "euclidean" else (b - a).abs().sum()).item())
        assert measured.similarities[index].item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_similarity_is_float32_whatever_comes_in():
    x, y = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    found = layer_similarity(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cosine_similarity(x.float(), y.float(), dim=-1))


def test_measuring_leaves_the_model_as_it_was():
    model = tiny("llama")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        expected = model(TOKENS).logits
        measure(model, TOKENS, micro_batch=2)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=0)
    assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_one_layers_gradients_at_a_time():
    model = tiny("llama")
    alive, most = [0], [0]

    def count(_):
        alive[0] = sum(p.requires_grad for p in model.parameters())
        most[0] = max(most[0], alive[0])

    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: count(module))
    measure(model, TOKENS, micro_batch=3)
    assert most[0] == 7  # the projections of one layer; norms, embeddings and head never


def test_bfloat16_weights_give_nearly_the_same_scores():
    model = tiny("llama", dtype=torch.float32)
    exact = measure(model, TOKENS, micro_batch=3).scores[1].mlp_channels
    rough = measure(model.bfloat16(), TOKENS, micro_batch=3).scores[1].mlp_channels
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.98


def test_statistics_survive_a_round_trip(tmp_path):
    measured = measure(tiny("qwen2", UNEQUAL), TOKENS, micro_batch=3)
    measured.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert (loaded.loss, loaded.tokens) == (measured.loss, 84)
    assert torch.equal(loaded.similarities, measured.similarities)
    assert torch.equal(loaded.scores[2].mlp_channels, measured.scores[2].mlp_channels)


POOL = torch.arange(40, dtype=torch.int32).view(20, 2)


@pytest.mark.parametrize("criterion", ["taylor_l1", "fluctuation"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("layers.1.mlp.down_proj", "the similarity of layer 1"),
        ("layers.2.self_attn.q_proj", "the similarity of layer 2"),
        ("norm", "the calibration loss"),
    ],
)
def test_a_model_that_gives_no_numbers_is_refused(place, what, value, criterion):
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule(f"model.{place}").weight.flatten()[7] = value
    with pytest.raises(CheckpointError, match=rf"{what} is not finite.* lower training\.learning_rate"):
        measure(model, TOKENS, micro_batch=3, criterion=criterion)


@pytest.mark.parametrize("criterion", ["taylor_l1", "magnitude_l2"])
def test_a_score_that_overflows_is_refused(criterion):
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        # A channel that is silent, so the loss is finite; its gradients and squares are not.
        model.model.layers[1].mlp.gate_proj.weight[5] = 0
        model.model.layers[1].mlp.up_proj.weight[5] = 1e30
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 1e30
    with pytest.raises(CheckpointError, match="a score of layer 1 is not finite"):
        measure(model, TOKENS, micro_batch=3, criterion=criterion)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["loss", "similarities", "kv_groups", "mlp_channels"])
def test_statistics_that_are_not_finite_are_refused(where, value, tmp_path):
    statistics = measure(tiny("llama"), TOKENS, micro_batch=3)
    if where == "loss":
        statistics = replace(statistics, loss=value)
    elif where == "similarities":
        statistics.similarities[2] = value
    else:
        getattr(statistics.scores[1], where)[2] = value
    statistics.save(tmp_path / "s")
    with pytest.raises(PlanError, match=r"not finite\)\. Run calibrate again"):
        Statistics.load(tmp_path / "s")


def test_a_draw_takes_no_document_twice_and_is_seeded():
    draw = draw_calibration(POOL, sequences=12, seed=3, step=0)
    assert len({tuple(row) for row in draw.tolist()}) == 12
    assert torch.equal(draw, draw_calibration(POOL, sequences=12, seed=3, step=0))
    assert not torch.equal(draw, draw_calibration(POOL, sequences=12, seed=3, step=1))
    assert not torch.equal(draw, draw_calibration(POOL, sequences=12, seed=4, step=0))
    whole = draw_calibration(POOL.int(), sequences=20, seed=3, step=0)
    assert whole.dtype == torch.int64
    assert sorted(whole.tolist()) == sorted(POOL.tolist())


def test_a_draw_larger_than_the_pool_is_refused():
    with pytest.raises(DataError, match=r"calibration\.sequences=21 is more than the 20 documents"):
        draw_calibration(POOL, sequences=21, seed=0, step=0)


def test_equal_statistics_are_equal_files_and_those_of_earlier_versions_are_read(tmp_path):
    found = measure(tiny("llama", UNEQUAL), TOKENS, micro_batch=3)
    for number in range(8):
        found.save(tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1
    told = {"format": "1", "loss": repr(found.loss), "tokens": str(found.tokens)}
    save_file(load_file(tmp_path / "0"), tmp_path / "earlier", metadata=told)
    for name in ("0", "earlier"):
        read = Statistics.load(tmp_path / name)
        assert (read.loss, read.tokens) == (found.loss, found.tokens)
        assert torch.equal(read.similarities, found.similarities)
