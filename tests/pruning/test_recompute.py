import pytest
import torch

from core.pruning.scoring.calibration import measure
from tests.support.models import CONFIGS, UNEQUAL, random_tokens, tiny

TOKENS = random_tokens(rows=5)  # three micro-batches of 2, 2 and 1


def same_scores(found, expected):
    for a, b in zip(found.scores, expected.scores, strict=True):
        for kind in ("query_heads", "kv_groups", "mlp_channels"):
            torch.testing.assert_close(getattr(a, kind), getattr(b, kind), rtol=1e-9, atol=1e-12)
    return True


@pytest.mark.parametrize("keep_bytes", [20_000, 2**30], ids=["some", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_do_not_depend_on_what_is_kept(name, keep_bytes):
    model = tiny(name, UNEQUAL if "olmo" not in name else None)
    expected = measure(model, TOKENS, micro_batch=2)  # equal to plain autograd: see test_calibration
    assert same_scores(measure(model, TOKENS, micro_batch=2, keep_bytes=keep_bytes), expected)


@pytest.mark.parametrize("criterion", ["taylor_signed", "taylor_per_microbatch"])
def test_every_criterion_that_goes_back_may_keep_outputs(criterion):
    model = tiny("llama-biased", UNEQUAL)
    expected = measure(model, TOKENS, micro_batch=2, criterion=criterion)
    assert same_scores(measure(model, TOKENS, micro_batch=2, criterion=criterion, keep_bytes=2**30), expected)


def computed(monkeypatch, name, keep_bytes):
    """How often each projection of the middle layer computes its output."""
    model, calls, original = tiny(name), {}, torch.nn.Linear.forward
    names = {module: name for name, module in model.model.layers[1].named_modules()}

    def forward(self, x):
        calls[names.get(self)] = calls.get(names.get(self), 0) + 1
        return original(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", forward)
        measure(model, TOKENS, micro_batch=2, keep_bytes=keep_bytes)
    return {key: calls[key] for key in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}


def test_what_is_kept_is_not_computed_again(monkeypatch):
    once, twice = 3, 6
    assert set(computed(monkeypatch, "llama", 2**30).values()) == {once}
    nothing_kept = computed(monkeypatch, "llama", 0)
    # Only the residual sum takes the last projection's output, whose value the backward pass does not need.
    assert nothing_kept.pop("mlp.down_proj") == once
    assert set(nothing_kept.values()) == {twice}


def test_the_last_projection_runs_again_where_a_norm_reads_it(monkeypatch):
    assert computed(monkeypatch, "gemma2", 0)["mlp.down_proj"] == 6


def test_the_longest_products_are_kept_first(monkeypatch):
    # Of (5 * 12) tokens: o_proj reads 60 numbers to write 48, q_proj 48 to write 60.
    room_for_o_proj = 3 * 60 * 48 * 8
    calls = computed(monkeypatch, "llama", room_for_o_proj)
    assert (calls["self_attn.o_proj"], calls["self_attn.q_proj"]) == (3, 6)
