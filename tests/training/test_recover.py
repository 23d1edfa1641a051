import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import modeling_utils

from core.errors import TrainingError
from core.model.simulation import simulate_training
from core.training.adapters import add_adapters
from core.training.recover import recover
from core.training.rows import Rows
from tests.support.models import UNEQUAL, random_tokens, tiny
from tests.support.training import HostCopies, training_settings, weights

RATES = dict(learning_rate=1e-3, min_learning_rate=1e-4)


def train(model, tokens, mask=None, first_step=0, total_steps=100, **changes):
    mask = torch.ones_like(tokens) if mask is None else mask
    return recover(
        model,
        Rows(tokens, mask),
        training_settings(**RATES | changes),
        first_step=first_step,
        total_steps=total_steps,
    )


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_add_up_to_the_global_batch(micro_batch):
    tokens = random_tokens(rows=8)
    mask = (torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) > 0.4).int()  # uneven rows
    whole, split = tiny("llama", UNEQUAL), tiny("llama", UNEQUAL)
    first = train(whole, tokens, mask)
    second = train(split, tokens, mask, micro_batch=micro_batch)
    assert [x for _, x, _ in first.losses] == pytest.approx([x for _, x, _ in second.losses])
    torch.testing.assert_close(weights(whole), weights(split), rtol=1e-6, atol=1e-7)


def test_the_loss_is_the_mean_over_trained_tokens():
    tokens, mask = random_tokens(rows=4), torch.zeros(4, 12, dtype=torch.int)
    mask[0, 3], mask[2, 7:9] = 1, 1
    model = tiny("llama")
    with torch.no_grad():
        logits = model(tokens).logits
        places = [(0, 3), (2, 7), (2, 8)]
        expected = sum(cross_entropy(logits[r, t - 1].float(), tokens[r, t]).item() for r, t in places) / 3
    report = train(model, tokens, mask)
    assert report.losses[0][1] == pytest.approx(expected, rel=1e-6)
    assert (report.trained_tokens, report.tokens) == (3, 48)


def test_prompts_are_not_trained_on():
    """One step of plain gradients on the replies' losses alone gives the same weights."""
    tokens, mask = random_tokens(rows=4), torch.zeros(4, 12, dtype=torch.int)
    mask[:, 0], mask[:, 6:] = 1, 1  # the first token has nothing before it: it can never be a target
    trained, expected = tiny("llama"), tiny("llama")
    train(trained, tokens, mask, max_grad_norm=0)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3 / 5, weight_decay=0)  # 5 steps warm up
    logits = expected(tokens).logits[:, 5:-1]
    cross_entropy(logits.flatten(0, 1), tokens[:, 6:].flatten()).backward()
    optimizer.step()
    torch.testing.assert_close(weights(trained), weights(expected))
    everything = tiny("llama")
    train(everything, tokens, max_grad_norm=0)
    assert not torch.allclose(weights(everything), weights(trained), rtol=0, atol=1e-5)


def test_a_batch_without_trained_tokens_changes_nothing_but_does_not_fail():
    model = tiny("llama")
    before = weights(model).clone()
    train(model, random_tokens(rows=4), torch.zeros(4, 12, dtype=torch.int))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_training_learns_a_text_by_heart():
    tokens = random_tokens(rows=4).repeat(40, 1)
    model = tiny("qwen2", UNEQUAL, dtype=torch.float32)
    losses = [loss for _, loss, _ in train(model, tokens, learning_rate=1e-2, total_steps=40).losses]
    assert losses[-1] < losses[0] / 4
    assert not model.training


def test_the_schedule_goes_on_where_the_last_phase_ended():
    report = train(tiny("llama"), random_tokens(rows=8), first_step=98)
    assert [step for step, _, _ in report.losses] == [98, 99]
    assert report.losses[-1][2] == pytest.approx(1e-4)


def test_autocast_keeps_float32_weights_and_comes_close():
    tokens = random_tokens(rows=8)
    exact, rough = tiny("llama", dtype=torch.float32), tiny("llama", dtype=torch.float32)
    first, second = train(exact, tokens), train(rough, tokens, precision="bfloat16")
    assert {p.dtype for p in rough.parameters()} == {torch.float32}
    assert second.losses[0][1] == pytest.approx(first.losses[0][1], rel=0.02)


def test_gradient_checkpointing_changes_no_number():
    tokens = random_tokens(rows=8)
    runs = {}
    models = {"plain": tiny("llama"), "frugal": tiny("llama")}
    for name, model in models.items():
        runs[name] = 0

        def count(_, inputs, name=name):
            runs[name] += 1

        model.model.layers[1].mlp.register_forward_pre_hook(count)
        train(model, tokens, gradient_checkpointing=name == "frugal")
    assert runs == {"plain": 2, "frugal": 4}, "each layer runs again for its backward pass"
    torch.testing.assert_close(weights(models["plain"]), weights(models["frugal"]))


@pytest.mark.parametrize(("precision", "lora_rank"), [("float32", 0), ("bfloat16", 2)])
def test_inputs_of_layers_in_host_memory_change_no_bit(monkeypatch, precision, lora_rank):
    monkeypatch.setattr(modeling_utils, "save_on_cpu", HostCopies)
    monkeypatch.setattr(HostCopies, "sizes", [])
    tokens, found = random_tokens(rows=8), []
    for place in ("device", "host"):
        model = tiny("llama-tied", UNEQUAL, dtype=torch.float32)
        if lora_rank:
            torch.manual_seed(0)
            add_adapters(model, lora_rank)
        frugal = dict(gradient_checkpointing=True, layer_inputs=place, precision=precision)
        report = train(model, tokens, micro_batch=2, **frugal)
        found.append((report.losses, report.series["gradient_norm"], weights(model).tolist()))
    assert found[0] == found[1]
    simulated = simulate_training(
        model.config, 2, 12, autocast=precision == "bfloat16", checkpointing=True, device="cpu",
        offload=True, lora_rank=lora_rank,
    )  # fmt: skip
    assert HostCopies.sizes == 4 * list(simulated.handed_over), "in each of 4 micro-batches"
    assert simulated.handed_over == (2 * 12 * 48 * 4,) * 3


def poisoned(model, what, step):
    """Let the logits, or one gradient, of an optimizer step be what they must not be."""
    count = {"runs": 0}

    def of_logits(module, inputs, output):
        count["runs"] += 1
        return output * math.nan if count["runs"] == step + 1 else output

    def of_gradient(gradient):
        count["runs"] += 1
        return gradient * math.inf if count["runs"] == step + 1 else gradient

    if what == "loss":
        model.lm_head.register_forward_hook(of_logits)
    else:
        model.model.layers[1].mlp.up_proj.weight.register_hook(of_gradient)
    return model


@pytest.mark.parametrize(("what", "found"), [("loss", "the loss is nan"), ("norm", "the l2 norm of the")])
@pytest.mark.parametrize("limit", [0, 1.0])
def test_a_step_that_is_not_finite_is_an_error_and_changes_nothing(what, found, limit):
    tokens, saved = random_tokens(rows=16), []
    model, expected = poisoned(tiny("llama", UNEQUAL), what, 2), tiny("llama", UNEQUAL)
    train(expected, tokens[:8], max_grad_norm=limit)
    with pytest.raises(TrainingError, match=rf"stopped at step 3 of 100: {found}.* Lower training\."):
        recover(
            model,
            Rows(tokens, torch.ones_like(tokens)),
            training_settings(**RATES, max_grad_norm=limit),
            first_step=0,
            total_steps=100,
            save=lambda _, progress: saved.append(progress.next_step),
        )
    assert saved == [1, 2]
    assert torch.equal(weights(model), weights(expected))


def test_a_gradient_norm_of_zero_clips_nothing():
    tokens = random_tokens(rows=8)
    free, unbounded, clipped = tiny("llama"), tiny("llama"), tiny("llama")
    train(free, tokens, max_grad_norm=0)
    train(unbounded, tokens, max_grad_norm=1e9)
    train(clipped, tokens, max_grad_norm=1e-12)
    torch.testing.assert_close(weights(free), weights(unbounded))
    assert not torch.allclose(weights(free), weights(clipped), atol=1e-6, rtol=0)
