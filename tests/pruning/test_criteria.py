import functools
from statistics import fmean, pvariance, stdev

import pytest
import torch
from torch.nn.functional import cross_entropy

from core.model.config import layer_shapes
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.criteria import CRITERIA
from tests.support.models import UNEQUAL, random_tokens, tiny

TOKENS = random_tokens(rows=7)
MICRO_BATCH = 3
LAYER = 1  # 4 query heads of size 10, 2 KV heads, 40 channels


def blocks_of(layer, kind, unit):
    """A list for each projection of a query head, KV head or channel: one-dimensional (values, gradients)."""
    attention, mlp, blocks = layer.self_attn, layer.mlp, []
    rows = [unit] if kind == "mlp" else list(range(unit * 10, unit * 10 + 10))
    producing = {
        "query": [attention.q_proj],
        "kv": [attention.k_proj, attention.v_proj],
        "mlp": [mlp.gate_proj, mlp.up_proj],
    }[kind]
    reading = {"query": [attention.o_proj], "kv": [], "mlp": [mlp.down_proj]}[kind]
    for module in producing:
        blocks.append([(module.weight[row], module.weight.grad[row]) for row in rows])
        if module.bias is not None:
            blocks[-1] += [(module.bias[row : row + 1], module.bias.grad[row : row + 1]) for row in rows]
    for module in reading:
        blocks.append([(module.weight[:, row], module.weight.grad[:, row]) for row in rows])
    return blocks


def weights_of(layer, kind, unit):
    return [pair for block in blocks_of(layer, kind, unit) for pair in block]


def reading_columns(layer, kind, unit):
    """For each row of a unit that a projection reads: (the weights that read it, its number)."""
    if kind == "mlp":
        return [(layer.mlp.down_proj.weight[:, unit], unit)]
    rows = range(unit * 10, unit * 10 + 10)
    return [(layer.self_attn.o_proj.weight[:, row], row) for row in rows] if kind == "query" else []


class Oracle:
    """A model whose gradients and activations were taken in plain passes."""

    def __init__(self, name):
        self.model = tiny(name, UNEQUAL).requires_grad_(True)
        self.layer = self.model.model.layers[LAYER]
        self.seen = {"query": [], "mlp": []}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, inputs, k=kind: self.seen[k].append(inputs[0].detach())
            )
            for kind, module in (("query", self.layer.self_attn.o_proj), ("mlp", self.layer.mlp.down_proj))
        ]
        self.backward(TOKENS.split(MICRO_BATCH))
        for hook in hooks:
            hook.remove()

    def backward(self, batches):
        self.model.zero_grad()
        for batch in batches:
            logits = self.model(batch).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            (loss / TOKENS[:, 1:].numel()).backward()

    @functools.cached_property
    def of_tokens(self):
        """For each token, the layer's parameters and what it adds to their gradients as it passes through."""
        linears = [module for module in self.layer.modules() if isinstance(module, torch.nn.Linear)]
        found = []
        for sequence in TOKENS.split(1):
            for here in torch.eye(sequence.shape[1], dtype=torch.bool):

                def alone(module, inputs, output, here=here):
                    bias = None if module.bias is None else module.bias.detach()
                    others = torch.nn.functional.linear(*inputs, module.weight.detach(), bias)
                    return torch.where(here[:, None], output, others)

                hooks = [module.register_forward_hook(alone) for module in linears]
                self.backward([sequence])
                for hook in hooks:
                    hook.remove()
                found.append([(each, each.grad) for module in linears for each in module.parameters()])
        return found

    def unit(self, criterion, members):
        """The score of a group, given as (kind, unit) pairs, by loops."""
        pairs = [pair for kind, unit in members for pair in weights_of(self.layer, kind, unit)]
        columns = [
            (weights, torch.cat(self.seen[kind])[..., row])
            for kind, unit in members
            for weights, row in reading_columns(self.layer, kind, unit)
        ]
        if criterion == "taylor_l1":
            return sum((w * g).abs().sum().item() for w, g in pairs)
        if criterion == "taylor_signed":
            return abs(sum((w * g).sum().item() for w, g in pairs))
        if criterion == "magnitude_l1":
            return sum(w.abs().sum().item() for w, _ in pairs)
        if criterion == "magnitude_l2":
            return sum(w.square().sum().item() for w, _ in pairs) ** 0.5
        if criterion == "wanda_sp":
            return sum(
                w.abs().sum().item() * fmean(v * v for v in x.flatten().tolist()) ** 0.5 for w, x in columns
            )
        if criterion == "fluctuation":
            return sum(w.square().sum().item() * pvariance(x.flatten().tolist()) for w, x in columns)
        if criterion == "activation_l2":
            squares = 0.0
            for kind, unit in members:
                rows = [row for _, row in reading_columns(self.layer, kind, unit)]
                for sequence in torch.cat(self.seen[kind]) if rows else ():
                    squares += fmean(token[rows].norm().item() for token in sequence) ** 2
            return squares**0.5
        if criterion == "standardised_fluctuation":
            return sum(self.standardised(kind, unit) for kind, unit in members if kind != "kv")
        if criterion == "leverage":
            return sum(self.leverage(kind, row) for kind, row in self.rows(members))
        if criterion == "obs":
            return sum(self.rise(kind, unit) for kind, unit in members if kind != "kv")
        if criterion == "fisher":
            total = 0.0
            for sequence in TOKENS.split(1):
                self.backward([sequence])
                total += self.squares(members)
            return total
        if criterion == "fisher_per_token":
            total = 0.0
            for gradients in self.of_tokens:
                for parameter, gradient in gradients:
                    parameter.grad = gradient
                total += self.squares(members)
            return total
        assert criterion == "taylor_per_microbatch"
        total = 0.0
        for batch in TOKENS.split(MICRO_BATCH):
            self.backward([batch])
            pairs = [pair for kind, unit in members for pair in weights_of(self.layer, kind, unit)]
            total += sum((w * g).abs().sum().item() for w, g in pairs)
        return total

    def squares(self, members):
        """The squared sum of w * g of each block of the units, by the gradients that are there."""
        blocks = [block for kind, unit in members for block in blocks_of(self.layer, kind, unit)]
        return sum(sum((w * g).sum().item() for w, g in block) ** 2 for block in blocks)

    def rows(self, members):
        return [(kind, row) for kind, unit in members for _, row in reading_columns(self.layer, kind, unit)]

    def inputs(self, kind):
        """(tokens, F) inputs of the projection that reads groups of a kind."""
        return torch.cat(self.seen[kind]).flatten(0, 1)

    def standardised(self, kind, unit):
        """A unit's mean over its rows' fluctuation (squared in heads), standardised over the layer."""
        units, fluctuation = (4, {}) if kind == "query" else (40, {})
        for member in range(units):
            for weights, row in reading_columns(self.layer, kind, member):
                found = weights.square().sum().item() * pvariance(self.inputs(kind)[:, row].tolist())
                fluctuation[row] = found**2 if kind == "query" else found
        values = fluctuation.values()
        own = [fluctuation[row] for _, row in self.rows([(kind, unit)])]
        return (fmean(own) - fmean(values)) / stdev(values)

    def leverage(self, kind, row):
        """How much of a row's inputs a ridge regression on all inputs explains, by singular values."""
        _, scale, right = torch.linalg.svd(self.inputs(kind), full_matrices=False)
        squares = scale.square()
        ridge = 0.01 * squares.sum() / right.shape[1]
        return (squares / (squares + ridge) * right[:, row].square()).sum().item()

    def rise(self, kind, unit):
        """The squared error a token, with the ridge, if a unit goes and least squares refits all the rest."""
        x = self.inputs(kind)
        linear = self.layer.self_attn.o_proj if kind == "query" else self.layer.mlp.down_proj
        ridge = 0.01 * x.square().mean(dim=0).mean()
        stacked = torch.cat([x / len(x) ** 0.5, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
        wanted = stacked @ linear.weight.detach().T
        gone = [row for _, row in self.rows([(kind, unit)])]
        left = stacked[:, [row for row in range(x.shape[1]) if row not in gone]]
        return (wanted - left @ torch.linalg.lstsq(left, wanted).solution).square().sum().item()


def test_a_variance_beside_a_large_mean_keeps_its_digits():
    """Sums of squares in float32 would lose it all."""
    criterion, noise = CRITERIA["fluctuation"], torch.Generator().manual_seed(0)
    batches = [1000 + 0.01 * torch.randn(2, 50, 3, 1, generator=noise) for _ in range(3)]
    total = sum(map(criterion.add, batches))
    found = criterion.score(torch.ones(3, 1, 2), total, 300)
    seen = torch.cat(batches).flatten(0, 1)
    expected = [2 * pvariance(seen[:, unit, 0].tolist()) for unit in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


MEASURED = [name for name in CRITERIA if name != "random"]


@pytest.mark.parametrize("name", ["llama-biased", "qwen2"])
@pytest.mark.parametrize("criterion", MEASURED)
def test_scores_equal_a_loop_over_the_groups_weights_and_activations(criterion, name):
    oracle = Oracle(name)
    scores = measure(oracle.model, TOKENS, micro_batch=MICRO_BATCH, criterion=criterion).scores[LAYER]
    assert layer_shapes(oracle.model.config)[LAYER].heads_per_group == 2

    def approx(*members):
        return pytest.approx(oracle.unit(criterion, members), rel=1e-9)

    for channel in (0, 17, 39):
        assert scores.mlp_channels[channel].item() == approx(("mlp", channel))
    for head in range(4):
        assert scores.query_heads[head].item() == approx(("query", head))
    for group in range(2):  # query head h belongs to KV head h // n_rep
        heads = [("query", group * 2), ("query", group * 2 + 1)]
        assert scores.kv_groups[group].item() == approx(("kv", group), *heads)


def test_random_scores_are_seeded_and_differ_between_layers():
    model = tiny("llama")

    def draw(seed):
        return measure(model, TOKENS, micro_batch=7, criterion="random", seed=seed).scores

    assert torch.equal(draw(1)[0].mlp_channels, draw(1)[0].mlp_channels)
    assert not torch.equal(draw(1)[0].mlp_channels, draw(2)[0].mlp_channels)
    assert not torch.equal(draw(1)[0].mlp_channels, draw(1)[1].mlp_channels)


@pytest.mark.parametrize(
    "criterion", ["taylor_signed", "wanda_sp", "magnitude_l1", "fisher", "fisher_per_token"]
)
def test_criteria_without_weight_gradients_ask_for_none(criterion):
    model = tiny("llama")
    asked = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, _: asked.extend(p for p in module.parameters() if p.requires_grad)
        )
    measure(model, TOKENS, micro_batch=3, criterion=criterion)
    assert asked == []


@pytest.mark.parametrize("criterion", MEASURED)
def test_fused_projections_score_like_separate_ones(criterion):
    fused, separate = tiny("phi3", UNEQUAL), tiny("llama", UNEQUAL)
    fused.config.sliding_window = None
    for module in fused.modules():  # the families' other defaults
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = separate.config.rms_norm_eps
        if hasattr(module, "qkv_proj"):
            module.config.sliding_window = None
    state = {}
    for name, tensor in fused.state_dict().items():
        index = int(name.split(".")[2]) if ".layers." in name else 0
        heads, kv_heads = UNEQUAL[index].query_heads * 10, UNEQUAL[index].kv_heads * 10
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([heads, kv_heads, kv_heads]), strict=True):
                state[name.replace("qkv", part)] = rows
        elif "gate_up_proj" in name:
            state[name.replace("gate_up", "gate")], state[name.replace("gate_up", "up")] = tensor.chunk(2)
        else:
            state[name] = tensor
    separate.load_state_dict(state)
    expected = measure(separate, TOKENS, micro_batch=MICRO_BATCH, criterion=criterion)
    found = measure(fused, TOKENS, micro_batch=MICRO_BATCH, criterion=criterion)
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    for a, b in zip(found.scores, expected.scores, strict=True):
        for kind in ("query_heads", "kv_groups", "mlp_channels"):
            torch.testing.assert_close(getattr(a, kind), getattr(b, kind), rtol=1e-8, atol=1e-12)
