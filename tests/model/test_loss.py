import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from core.model import loss as module
from core.model.build import model_shape
from core.model.decoder import final_states
from core.model.loss import (
    Lesson,
    StoredLesson,
    divergence_gradient,
    divergence_sum,
    likeliest,
    loss_gradient,
    loss_sum,
)
from core.model.simulation import simulate_training
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny

TOKENS = random_tokens(rows=5)
VOCABULARY = 101


@pytest.fixture(params=[VOCABULARY - 1, 7 * VOCABULARY + 1, 10**6], ids=["1 position", "7 positions", "all"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": request.param})


def some_trained():
    mask = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[2] = False
    return mask.to(torch.uint8)


def plain(model, trained=None):
    """Losses by autograd on the logits of all positions at once."""
    logits, targets = model(TOKENS).logits[:, :-1], TOKENS[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses.sum() if trained is None else losses[trained[:, 1:] == 1].sum()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("chunks")
def test_the_sum_is_that_of_all_logits_at_once(name):
    model = tiny(name)
    with torch.no_grad(), Float64Throughout():
        assert loss_sum(model, final_states(model, TOKENS), TOKENS) == pytest.approx(
            plain(model).item(), rel=1e-13
        )
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("trained", [None, some_trained()], ids=["all", "some"])
@pytest.mark.usefixtures("chunks")
def test_all_gradients_are_autograds(name, trained):
    model = tiny(name)
    with Float64Throughout():
        (0.3 * plain(model, trained)).backward()
        expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        states = final_states(model, TOKENS)
        total, gradient = loss_gradient(model, states, TOKENS, scale=0.3, trained=trained)
        states.backward(gradient)
        assert total.item() == pytest.approx(plain(model, trained).item(), rel=1e-13)
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.usefixtures("chunks")
def test_under_autocast_gradients_of_all_chunks_and_batches_add_up(name, monkeypatch):
    monkeypatch.setattr(module, "_PART_ROWS", 30)  # of a vocabulary of 101
    model = tiny(name).float()
    (2 * plain(model)).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            states = final_states(model, TOKENS)
            _, gradient = loss_gradient(model, states, TOKENS, scale=1.0)
        states.backward(gradient)
    for key, parameter in model.named_parameters():
        # Roundings to bfloat16 cost up to 9 %; without one of two batches it would be half.
        assert (parameter.grad - expected[key]).norm() < 0.15 * expected[key].norm(), key


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_it_is_transformers_own_loss(name):
    model, trained = tiny(name), some_trained()
    labels = TOKENS.masked_fill(trained == 0, -100)
    theirs = model(TOKENS, labels=labels).loss.item()
    counted = int(trained[:, 1:].sum())
    ours, _ = loss_gradient(model, final_states(model, TOKENS), TOKENS, scale=1.0, trained=trained)
    assert ours.item() / counted == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_frozen_head_gets_no_gradient(name):
    model = tiny(name)
    model.requires_grad_(False)
    states = final_states(model, TOKENS).requires_grad_()
    _, gradient = loss_gradient(model, states, TOKENS, scale=1.0)
    expected = torch.autograd.grad(
        cross_entropy(model.lm_head(states)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"),
        states,
    )[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert states.grad is None, "the caller continues from the returned gradient"


def test_without_a_trained_token_every_gradient_is_zero():
    model = tiny("llama")
    states = final_states(model, TOKENS)
    total, gradient = loss_gradient(model, states, TOKENS, scale=1.0, trained=torch.zeros_like(TOKENS))
    assert total == 0
    assert not gradient.any()
    assert not model.lm_head.weight.grad.any()


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of V numbers that any operation returned."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.most = max(self.most, tensor.numel() // VOCABULARY)
        return result


def test_one_array_of_logits_is_all_that_a_chunk_takes():
    """A second one, or a gradient of the head beside the one that it has, would take as much again."""
    config, positions = CONFIGS["llama-tied"](), 64
    config.vocab_size = 4_000
    found = simulate_training(
        config, 4, positions // 4, autocast=False, checkpointing=False, device="cpu", accumulate=True
    )
    gradients = 4 * model_shape(config).num_params()
    logits = 4 * (positions - 4) * config.vocab_size  # the last position of a row predicts nothing
    assert logits < found.peak - gradients - found.kept < 1.3 * logits


@pytest.mark.parametrize("trained", [None, some_trained()], ids=["all", "some"])
def test_the_logits_of_one_chunk_exist_at_once_and_of_trained_positions_only(trained, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": 7 * VOCABULARY})
    model, read = tiny("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:-1].numel()))
    states = final_states(model, TOKENS)
    with LargestLogits() as logits:
        loss_gradient(model, states, TOKENS, scale=1.0, trained=trained)
    # The weight of the head, transposed, has V columns as well: D rows.
    assert logits.most <= max(7, model.config.hidden_size)
    assert max(read) == 7
    assert sum(read) == (5 * 11 if trained is None else int(trained[:, 1:].sum()))
    read.clear()
    loss_sum(model, states.detach(), TOKENS)
    assert max(read) == 7
    assert sum(read) == 5 * 11


def test_losses_of_bfloat16_logits_are_float32():
    model = tiny("llama", dtype=torch.bfloat16)
    states = final_states(model, TOKENS).detach()
    logits = model.lm_head(states)[:, :-1].flatten(0, 1).float()
    expected = cross_entropy(logits, TOKENS[:, 1:].flatten(), reduction="sum").item()
    assert loss_sum(model, states, TOKENS) == pytest.approx(expected, rel=1e-5)
    total, gradient = loss_gradient(model, states, TOKENS, scale=1.0)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.dtype == torch.bfloat16


def pair(name, dtype=torch.float64):
    """A model and another of the family, of other sizes, that is its teacher."""
    return tiny(name, UNEQUAL, dtype=dtype), tiny(name, dtype=dtype, seed=1)


def plain_divergence(model, teacher):
    """By autograd on the logits of all positions at once."""
    with torch.no_grad():
        p = teacher(TOKENS).logits.softmax(dim=-1)
    return (p * (p.log() - model(TOKENS).logits.log_softmax(dim=-1))).sum()


def divergence_and_gradients(model, teacher, scale=1.0):
    model.zero_grad()
    states, aims = final_states(model, TOKENS), final_states(teacher, TOKENS)
    total, gradient = divergence_gradient(model, states, teacher, aims, scale=scale)
    states.backward(gradient)
    return total, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("chunks")
def test_the_divergence_and_all_its_gradients_are_autograds(name):
    model, teacher = pair(name)
    with Float64Throughout():
        expected = plain_divergence(model, teacher)
        (0.3 * expected).backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        total, found = divergence_and_gradients(model, teacher, scale=0.3)
        states, aims = final_states(model, TOKENS), final_states(teacher, TOKENS)
        assert divergence_sum(model, states, teacher, aims) == total
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert found.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_divergence_is_torchs_kl_of_probabilities():
    model, teacher = pair("llama")
    p, q = (torch.distributions.Categorical(logits=of(TOKENS).logits) for of in (teacher, model))
    expected = torch.distributions.kl_divergence(p, q).sum().item()
    assert divergence_and_gradients(model, teacher)[0] == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(torch.distributions.kl_divergence(q, p).sum().item(), rel=0.01)


def test_the_gradient_of_the_divergence_is_its_slope():
    model, teacher = pair("gemma2")
    states, aims = final_states(model, TOKENS).detach(), final_states(teacher, TOKENS).detach()
    _, gradient = divergence_gradient(model, states, teacher, aims, scale=1.0)
    for direction in torch.randn(5, *states.shape, dtype=states.dtype):
        ahead, behind = (
            divergence_sum(model, states + step * direction, teacher, aims) for step in (1e-5, -1e-5)
        )
        assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_diverges_from_itself(dtype):
    model = tiny("gemma2", UNEQUAL, dtype=dtype)
    total, gradients = divergence_and_gradients(model, model)
    assert total == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_logits_of_both_models_exist_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": 7 * VOCABULARY})
    model, teacher = pair("llama")
    states, aims = final_states(model, TOKENS), final_states(teacher, TOKENS)
    with LargestLogits() as logits:
        divergence_gradient(model, states, teacher, aims, scale=1.0)
        divergence_sum(model, states, teacher, aims)
    assert logits.most <= max(7, model.config.hidden_size)


def test_no_certainty_of_either_model_breaks_the_divergence():
    """A probability of 0 in float32 has a logarithm all the same."""
    logits = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, -300.0]])
    wanted = torch.tensor([[0.0, 1.0, 2.0], [500.0, -500.0, 0.0]])
    divergence, gradient = module._divergence(logits.clone(), wanted.clone())
    p, q = wanted.double().softmax(-1), logits.double().softmax(-1)
    expected = (p * (wanted.double().log_softmax(-1) - logits.double().log_softmax(-1))).sum()
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), q - p, rtol=1e-5, atol=1e-6)


def plain_lesson(model, teacher, trained, weight, temperature):
    """By autograd on all logits at once: a mean of two sums, weighted."""
    with torch.no_grad():
        p = (teacher(TOKENS).logits / temperature).softmax(dim=-1)
    q = (model(TOKENS).logits / temperature).softmax(dim=-1)
    each = (p * (p.log() - q.log())).sum(dim=-1)[:, :-1]
    divergence = temperature**2 * each[trained[:, 1:] == 1].sum()
    return (1 - weight) * plain(model, trained) + weight * divergence


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (1.0, 3.0), (0.3, 1.0), (0.7, 0.6)])
@pytest.mark.usefixtures("chunks")
def test_a_lesson_and_all_its_gradients_are_autograds(name, weight, temperature):
    (model, teacher), trained = pair(name), some_trained()
    with Float64Throughout():
        expected = plain_lesson(model, teacher, trained, weight, temperature)
        (0.3 * expected).backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        states, aims = final_states(model, TOKENS), final_states(teacher, TOKENS).detach()
        lesson = Lesson(teacher=teacher, aims=aims, weight=weight, temperature=temperature)
        total, gradient = loss_gradient(model, states, TOKENS, scale=0.3, trained=trained, lesson=lesson)
        states.backward(gradient)
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


def stored(teacher, trained, count, weight, temperature):
    with torch.no_grad():
        logits = teacher(TOKENS).logits[:, :-1][trained[:, 1:] == 1]
        ids, logs, _ = likeliest(logits, count, temperature)
    return StoredLesson(ids=ids, logs=logs, weight=weight, temperature=temperature)


def plain_stored_lesson(model, teacher, trained, count, weight, temperature):
    """By autograd, a position at a time: the likeliest tokens, and one number for the others."""
    counted, divergence = trained[:, 1:] == 1, 0.0
    with torch.no_grad():
        all_p = (teacher(TOKENS).logits / temperature).softmax(dim=-1)[:, :-1][counted]
    all_q = (model(TOKENS).logits / temperature).softmax(dim=-1)[:, :-1][counted]
    for p, q in zip(all_p, all_q, strict=True):
        order = p.argsort(descending=True)
        shares = [*((p[token], q[token]) for token in order[:count])]
        if count < len(p):
            shares.append((p[order[count:]].sum(), q[order[count:]].sum()))
        divergence += sum(own * (own / other).log() for own, other in shares)
    return (1 - weight) * plain(model, trained) + weight * temperature**2 * divergence


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 1), ("gemma2", 9), ("llama", VOCABULARY - 1), ("llama", VOCABULARY)]
)
@pytest.mark.usefixtures("chunks")
def test_a_stored_lesson_and_all_its_gradients_are_autograds(name, count):
    (model, teacher), trained, weight, temperature = pair(name), some_trained(), 0.3, 2.5
    with Float64Throughout():
        expected = plain_stored_lesson(model, teacher, trained, count, weight, temperature)
        full = plain_lesson(model, teacher, trained, weight, temperature).item()
        (0.3 * expected).backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        lesson, states = stored(teacher, trained, count, weight, temperature), final_states(model, TOKENS)
        total, gradient = loss_gradient(model, states, TOKENS, scale=0.3, trained=trained, lesson=lesson)
        states.backward(gradient)
    assert total.item() == pytest.approx(expected.item(), rel=1e-11)
    assert total.item() <= full * (1 + 1e-12), "what is told apart less differs less"
    assert (total.item() == pytest.approx(full, rel=1e-11)) == (count >= VOCABULARY - 1)
    for key, value in gradients.items():
        torch.testing.assert_close(model.get_parameter(key).grad, value, rtol=1e-8, atol=1e-11)


def test_what_is_kept_of_a_teacher_and_what_that_leaves_out():
    logits = torch.randn(6, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    for count, temperature in [(1, 1.0), (5, 2.0), (22, 1.0), (23, 0.5)]:
        ids, logs, left_out = likeliest(logits, count, temperature)
        for row, tokens, kept, lost in zip(logits, ids, logs, left_out, strict=True):
            p = (row / temperature).softmax(-1)
            order = p.argsort(descending=True).tolist()
            assert tokens.tolist() == order[:count]
            others = p[order[count:]]
            torch.testing.assert_close(kept.exp(), torch.cat([p[order[:count]], others.sum()[None]]))
            even = p.clone()
            if len(others):
                even[order[count:]] = others.mean()
            assert lost.item() == pytest.approx((p * (p / even).log()).sum().item(), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_lesson_takes_the_logits_of_both_models_a_chunk_at_a_time_where_tokens_are_trained(
    temperature, monkeypatch
):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", {"cpu": 7 * VOCABULARY})
    (model, teacher), trained, read = pair("llama"), some_trained(), {"model": [], "teacher": []}
    for name, of in (("model", model), ("teacher", teacher)):
        of.lm_head.register_forward_pre_hook(
            lambda _, inputs, name=name: read[name].append(inputs[0].shape[:-1].numel())
        )
    states, aims = final_states(model, TOKENS), final_states(teacher, TOKENS).detach()
    lesson = Lesson(teacher=teacher, aims=aims, weight=0.5, temperature=temperature)
    with LargestLogits() as logits:
        loss_gradient(model, states, TOKENS, scale=1.0, trained=trained, lesson=lesson)
    assert logits.most <= max(7, model.config.hidden_size)
    assert read["model"] == read["teacher"]  # one pass over the logits of each
    assert max(read["model"]) == 7
    assert sum(read["model"]) == int(trained[:, 1:].sum())
