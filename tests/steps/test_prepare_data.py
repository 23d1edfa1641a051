"""prepare-data refuses texts with tokens that the base model has no embedding of."""

import json

import pytest

from core.data import mixture
from core.errors import CheckpointError
from core.steps.prepare_data import run_prepare_data
from tests.support.project import recipe_with, resolve, rewrite_base


@pytest.fixture
def prepare(folder):
    """Prepares the data of a base model whose embedding has so many rows; its tokenizer knows 400 tokens."""

    def prepare(rows, **changes):
        rewrite_base(folder / "base", {"vocab_size": rows})
        texts = [f"{n:05b}".replace("0", "~").replace("1", "^") * 20 for n in range(30)]
        (folder / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        changes = {"prune.target": "90%"} | {name.replace("__", "."): of for name, of in changes.items()}
        handle, base_uri = resolve(recipe_with(changes))
        return run_prepare_data(run=handle, base_uri=base_uri)

    return prepare


def refused(call):
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


PLAIN = {"path": "plain.jsonl"}
"""Of three tokens with low ids."""


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({}, "held-out.txt"),
        ({"evaluation__perplexity": PLAIN}, "texts.jsonl"),
        ({"evaluation__perplexity": PLAIN, "calibration__source": PLAIN}, "plain.jsonl, texts.jsonl"),
    ],
    ids=["held out", "calibration", "training"],
)
def test_tokens_beyond_the_embedding_are_named_with_their_texts(prepare, changes, texts):
    both = [PLAIN, {"path": "texts.jsonl"}]
    text = refused(lambda: prepare(300, training__sources=both, **changes))
    assert text.startswith("the tokenizer of base makes token 3")
    assert f" of {texts}, but the model's embedding has only 300 rows (vocab_size in its config.json)" in text
    assert text.endswith("or resize its embedding to the tokenizer and train it.")


def test_an_end_token_beyond_the_embedding_is_refused_before_texts_are_tokenized(
    prepare, folder, monkeypatch
):
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|new_end|>"}))
    monkeypatch.setattr(mixture, "write_slices", lambda *_, **__: pytest.fail("texts are tokenized"))
    text = refused(lambda: prepare(400, evaluation__perplexity=None))
    assert text.startswith("the tokenizer of base makes token 400 of texts.jsonl, ")


def test_a_tokenizer_may_know_tokens_that_no_text_has(prepare):
    plain = {"evaluation__perplexity": PLAIN, "calibration__source": PLAIN, "training__sources": [PLAIN]}
    assert prepare(300, **plain)
