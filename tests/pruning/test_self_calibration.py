"""Text that a model writes: each token drawn from what it expects, against passes over all tokens before."""

import pytest
import torch

from core.errors import DataError
from core.pruning.self_calibration import write_text
from tests.support.models import tiny
from tests.support.texts import with_begin_token

FAMILIES = ["llama", "qwen2", "gemma2"]


def begins(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


@pytest.fixture
def model(tokenizer):
    found = tiny("llama")
    found.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return found


@torch.no_grad()
def written_without_a_cache(model, start, chances):
    """(T,) ids by cumulative sums over a softmax, one sequence at a time."""
    ids = list(start)
    for chance in chances:
        expected = model(torch.tensor([ids])).logits[0, -1].double().softmax(dim=-1)
        total, token = 0.0, 0
        while (total := total + expected[token].item()) < chance and token < len(expected) - 1:
            token += 1
        ids.append(token)
    return ids[len(start) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_drawn_from_what_the_model_expects_after_those_before(family, tokenizer):
    model = tiny(family)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    found = write_text(model, tokenizer, sequences=5, length=12, batch=2, seed=3)
    assert (found.shape, found.dtype) == ((5, 12), torch.int64)
    chances = torch.rand(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = [begins(tokenizer, "<|endoftext|>")]
    for row, chance in zip(found.tolist(), chances.tolist(), strict=True):
        assert row == written_without_a_cache(model, start, chance)
    assert len({tuple(row) for row in found.tolist()}) == 5


def test_first_tokens_come_as_often_as_they_are_expected(model, tokenizer):
    found = write_text(model, tokenizer, sequences=4_000, length=1, batch=1_000, seed=0).flatten()
    start = torch.tensor([[begins(tokenizer, "<|endoftext|>")]])
    with torch.no_grad():
        expected = 4_000 * model(start).logits[0, -1].softmax(dim=-1)
    often = expected > 40
    assert often.sum() >= 5
    counts = torch.bincount(found, minlength=len(expected)).double()
    assert ((counts - expected)[often].abs() < 5 * expected[often].sqrt()).all()


def test_the_draws_do_not_depend_on_the_batch_but_on_the_seed(model, tokenizer):
    written = [
        write_text(model, tokenizer, sequences=6, length=8, batch=batch, seed=seed)
        for batch, seed in ((1, 1), (4, 1), (6, 1), (6, 2))
    ]
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
    assert not torch.equal(written[2], written[3])


def test_what_another_attempt_has_written_is_gone_on_with(model, tokenizer):
    kept = []
    asked = {"sequences": 7, "length": 8, "batch": 3, "seed": 1}
    whole = write_text(model, tokenizer, **asked, keep=kept.append)
    assert [len(tokens) for tokens in kept] == [3, 6]
    assert torch.equal(kept[1], whole[:6])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(write_text(model, tokenizer, **asked | {"batch": 2}, written=kept[0]), whole)
    assert len(calls) == 2 * 8, "two batches of eight tokens"


def test_sequences_open_as_texts_of_the_tokenizer_do(model, tokenizer):
    begin = with_begin_token(tokenizer)
    found = write_text(model, tokenizer, sequences=3, length=8, batch=2, seed=1)
    assert found.shape == (3, 8)
    assert (found[:, 0] == begin).all()
    chances = torch.rand(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert found[2, 1:].tolist() == written_without_a_cache(model, [begin], chances[2].tolist())
    with pytest.raises(DataError, match="sequences of 1 tokens leave no room for text"):
        write_text(model, tokenizer, sequences=3, length=1, batch=2, seed=1)


def test_without_a_token_between_documents_a_text_begins_after_the_end_of_one(model, tokenizer, monkeypatch):
    known = {name: number for name, number in tokenizer.get_vocab().items() if name != "<|endoftext|>"}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: known)
    found = write_text(model, tokenizer, sequences=1, length=5, batch=1, seed=1)
    chances = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert found[0].tolist() == written_without_a_cache(model, [tokenizer.eos_token_id], chances.tolist())
