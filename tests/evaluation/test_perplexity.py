import dataclasses
import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from core import progress
from core.errors import CheckpointError, DataError
from core.evaluation.cache import AnswerCache
from core.evaluation.perplexity import measure_text, measure_windows, perplexity

SIZES = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=32, initializer_range=0.3))
    return model.eval()


@pytest.fixture
def windows():
    return torch.randint(0, 67, (5, 11), generator=torch.Generator().manual_seed(1))


def one_token_at_a_time(model, windows):
    losses = []
    for window in windows:
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :position]).logits[0, -1].double()
            losses.append(torch.logsumexp(logits, 0) - logits[window[position]])
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_it_is_what_a_loop_over_single_predictions_gives(llama, windows, batch_size):
    expected = one_token_at_a_time(llama, windows)
    assert perplexity(llama, windows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_sliding_windows_the_new_tokens_count(llama, windows, batch_size):
    trained = torch.ones(5, 11, dtype=torch.uint8)
    trained[1:, :7] = 0
    trained[4, :9] = 0
    losses = []
    for window, marks in zip(windows, trained, strict=True):
        for position in (p for p in range(1, 11) if marks[p]):
            with torch.no_grad():
                logits = llama(window[None, :position]).logits[0, -1].double()
            losses.append(float(torch.logsumexp(logits, 0) - logits[window[position]]))
    found = measure_windows(llama, windows, batch_size=batch_size, trained=trained)
    metric = found.metrics["perplexity"]
    assert metric.weights == (10, 4, 4, 4, 2)
    assert metric.over_all() == pytest.approx(math.exp(sum(losses) / 24), rel=1e-5)
    assert set(found.items).isdisjoint(measure_windows(llama, windows, batch_size=5).items)


def test_a_cap_on_the_logits_is_honoured(windows):
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.5, sliding_window=8, initializer_range=0.3)
    gemma = Gemma2ForCausalLM(config).eval()
    expected = one_token_at_a_time(gemma, windows)
    gemma.config.final_logit_softcapping = None
    assert one_token_at_a_time(gemma, windows) != pytest.approx(expected, rel=0.1)
    gemma.config.final_logit_softcapping = 0.5
    assert perplexity(gemma, windows, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_a_forward_pass_takes_as_many_windows_as_are_asked_for(llama, windows):
    batches = []
    llama.model.layers[0].register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    perplexity(llama, windows, batch_size=4)
    assert batches == [4, 1]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(llama, windows):
    torch.nn.init.zeros_(llama.lm_head.weight)
    assert perplexity(llama, windows, batch_size=2) == pytest.approx(67, rel=1e-6)


def test_many_windows_lose_no_digits(llama, windows):
    once = perplexity(llama, windows, batch_size=64)
    assert perplexity(llama, windows.repeat(400, 1), batch_size=64) == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize("was_training", [True, False])
def test_the_model_is_evaluated_without_dropout_and_keeps_its_mode(windows, was_training):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5, initializer_range=0.3))
    model.train(was_training)
    first = perplexity(model, windows, batch_size=5)
    assert model.training is was_training
    assert perplexity(model, windows, batch_size=5) == first


def test_the_log_reports_progress(llama, windows, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO):
        perplexity(llama, windows, batch_size=2)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "perplexity: 2 of 5 windows",
        "perplexity: 4 of 5 windows",
        caplog.messages[-2],
        caplog.messages[-1],
    ]
    assert caplog.messages[-2].startswith("perplexity: 5 windows in ")
    assert caplog.messages[-1].endswith("on 5 windows of 11 tokens")


@pytest.mark.parametrize("shape", [(0, 11), (4, 1), (11,)])
def test_windows_that_predict_nothing_are_an_error(llama, shape):
    with pytest.raises(DataError, match=r"at least one window of at least 2 tokens.*more text"):
        perplexity(llama, torch.zeros(shape, dtype=torch.long), batch_size=1)


@pytest.mark.parametrize("token", [67, -1])
def test_a_token_that_the_model_does_not_know_is_an_error(llama, windows, token):
    windows[3, 5] = token
    with pytest.raises(DataError, match=f"token {token}, but the model's vocabulary has 67"):
        perplexity(llama, windows, batch_size=1)


def test_logits_that_are_not_numbers_are_an_error(llama, windows):
    llama.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="perplexity is not a number"):
        perplexity(llama, windows, batch_size=1)


def test_a_hopeless_model_has_infinite_perplexity(llama, windows):
    llama.lm_head.weight.data *= 1e4
    assert perplexity(llama, windows, batch_size=5) == math.inf


def test_windows_that_were_measured_are_not_measured_again(llama, windows, tmp_path):
    asked = []

    def model():
        asked.append(1)
        return llama

    def measured(tokens, cache, *, batch_size=2, **columns):
        save_file({"input_ids": tokens, **columns}, tmp_path / "text.safetensors")
        before = len(asked)
        found = measure_text(model, tmp_path / "text.safetensors", batch_size=batch_size, cache=cache)
        return found, len(asked) > before

    cache = AnswerCache(store=str(tmp_path / "store"), checkpoint="c0", precision="float32")
    windows = windows.int()
    first, computed = measured(windows, cache)
    assert computed
    assert first == measured(windows, None)[0]
    assert measured(windows, cache, batch_size=5) == (first, False)
    marks = torch.ones(5, 11, dtype=torch.uint8)
    for others, columns in (
        (dataclasses.replace(cache, checkpoint="c1"), {}),
        (dataclasses.replace(cache, precision="bfloat16"), {}),
        (cache, {"trained": marks}),
        (cache, {"trained": marks.tril()}),
    ):
        found, computed = measured(windows, others, **columns)
        assert computed
        assert measured(windows, others, **columns) == (found, False)
    assert measured(windows.roll(1), cache)[1]
