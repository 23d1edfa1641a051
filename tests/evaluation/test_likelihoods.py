import pytest
import torch

from core.evaluation import likelihoods
from core.evaluation.language_model import _fitting
from core.evaluation.likelihoods import can_share, log_likelihoods
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, tiny

# Contexts of several answers, one that begins another, answers of one token, the same request twice.
REQUESTS = [
    ([5, 9], [11, 12, 13]),
    ([5, 9], [11, 12, 14]),
    ([5, 9, 11], [12]),
    ([7], [50]),
    ([7], [51]),
    ([5, 9], [60]),
    ([20, 21, 22], [23, 24]),
    ([7], [50]),
]


def one_by_one(model, requests):
    """Each continuation's log-probability, each token of it from a forward pass of its own."""
    answers = []
    for context, continuation in requests:
        score, likeliest = 0.0, True
        for place, token in enumerate(continuation):
            with torch.no_grad():
                logits = model(torch.tensor([context + continuation[:place]])).logits[0, -1].double()
            score += float(torch.log_softmax(logits, dim=0)[token])
            likeliest &= int(logits.argmax()) == token
        answers.append((score, likeliest))
    return answers


def shared(model, requests, batch_size=100):
    answers = [None] * len(requests)
    for number, score, likeliest in log_likelihoods(model, requests, batch_size=batch_size):
        assert answers[number] is None
        answers[number] = (score, likeliest)
    return answers


@pytest.mark.parametrize("layers", [None, UNEQUAL])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_in_one_sequence_are_those_of_single_predictions(name, layers):
    model = tiny(name, layers)
    with Float64Throughout():
        expected = one_by_one(model, REQUESTS)
        found = shared(model, REQUESTS)
    assert can_share(model, REQUESTS)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-6)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


def test_logarithms_of_a_bfloat16_models_probabilities_are_float32():
    scores = [score for score, _ in shared(tiny("llama", dtype=torch.bfloat16), REQUESTS)]
    expected = [score for score, _ in one_by_one(tiny("llama", dtype=torch.bfloat16), REQUESTS)]
    assert scores == pytest.approx(expected, abs=0.3)
    assert all(score != float(torch.tensor(score).bfloat16()) for score in scores)


def test_an_answer_is_likeliest_only_with_all_of_its_tokens():
    model = tiny("llama")
    context = [5, 9]
    with torch.no_grad():
        first = int(model(torch.tensor([context])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*context, first]])).logits[0, -1].argmax())
    found = shared(model, [(context, [first, second]), (context, [first, second ^ 1]), (context, [first])])
    assert [likeliest for _, likeliest in found] == [True, False, True]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("limit", [1, 6, 256])
def test_passes_hold_no_more_than_they_may_and_all_is_answered(monkeypatch, batch_size, limit):
    monkeypatch.setitem(likelihoods._PASS_TOKENS, "cpu", limit)
    model = tiny("llama")
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    found = shared(model, REQUESTS, batch_size)
    assert len(shapes) >= len(REQUESTS) / batch_size
    assert all(rows == 1 and tokens <= max(limit, 4) for rows, tokens in shapes)  # 4: the longest request
    expected = one_by_one(tiny("llama"), REQUESTS)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)


def test_a_context_is_computed_once_and_its_logits_alone():
    model = tiny("llama")
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    shared(model, [([3] * 20, [4, 5]), ([3] * 20, [6]), ([3] * 20, [7])])
    assert seen == [21, 2]


def test_requests_longer_than_a_window_are_left_to_others():
    model = tiny("mistral")  # a window of 5
    assert can_share(model, [([3, 4, 5], [6, 7])])
    assert not can_share(model, [([3, 4, 5], [6, 7, 8])])


@pytest.mark.parametrize("length", [5, 6, 9])
def test_a_context_is_cut_from_the_left_as_lm_eval_does(length):
    """It gives the model ``(context + continuation)[-(length + 1):][:-1]``."""
    for size in range(1, 12):
        for answer in range(1, 6):
            context, continuation = list(range(size)), list(range(100, 100 + answer))
            cut, kept = _fitting(context, continuation, length)
            assert kept == continuation
            assert cut + kept == (context + continuation)[-(length + 1) :]
            assert cut
