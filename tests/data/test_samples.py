"""Calibration sequences and perplexity windows are cut out of documents."""

import dataclasses
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.data.packing import PLAIN_TEMPLATE
from core.data.samples import write_perplexity_windows
from core.errors import DataError
from tests.support.texts import chat_source, documents, drawn, pool, text_source, with_begin_token

pytestmark = pytest.mark.usefixtures("own_cache")


def test_calibration_rows_are_windows_of_distinct_documents_that_are_long_enough(tmp_path, tokenizer):
    texts = documents(6, 80, (1, 30))
    source = text_source(tmp_path / "a.jsonl", [*texts, *texts])
    encoded = [tokenizer.encode(text) for text in texts]
    rows = pool(source, tokenizer, tmp_path)
    assert len(rows) == sum(len(ids) >= 40 for ids in encoded) >= 10
    places = []
    for row in rows.tolist():
        found = [
            (n, start)
            for n, ids in enumerate(encoded)
            for start in range(len(ids) - 39)
            if ids[start : start + 40] == row
        ]
        assert len(found) == 1
        places += found
    assert len({n for n, _ in places}) == len(rows)
    assert len({start for _, start in places}) > 5  # the windows do not all lie at the start


def test_a_calibration_pool_reads_no_more_documents_than_asked(tmp_path, tokenizer):
    source = text_source(tmp_path / "a.jsonl", documents(6, 80, (40, 50)))
    assert len(pool(source, tokenizer, tmp_path, documents=30, at_least=30)) == 30
    with pytest.raises(DataError, match=r"only 30 of 30 documents have the 40 tokens .* 31 are needed"):
        pool(source, tokenizer, tmp_path, documents=30, at_least=31)
    with pytest.raises(DataError, match="only 0 of 80 documents"):
        pool(source, tokenizer, tmp_path, sequence_length=4000)


def plain_packing(documents: list[list[int]], end: int, length: int) -> list[list[int] | None]:
    """What packing should give, token by token; None stands for the window of a long document."""
    rows, row = [], []
    for ids in documents:
        if len(ids) >= length:
            rows.append(None)
            continue
        for token in [*ids, end]:
            row.append(token)
            if len(row) == length:
                rows.append(row)
                row = []
                break
    return rows


def test_packing_joins_short_documents_and_leaves_none_in_two_sequences(tmp_path, tokenizer):
    texts = documents(9, 90, (1, 14))
    source = text_source(tmp_path / "a.jsonl", texts)
    settings = {"sequence_length": 30, "documents": 80, "seed": 3}
    windows = pool(source, tokenizer, tmp_path, **settings).tolist()
    rows = pool(source, tokenizer, tmp_path, packing=True, **settings)
    texts_drawn = [tokenizer.encode(text) for text in drawn(source, tokenizer, seed=3)][:80]
    expected = plain_packing(texts_drawn, tokenizer.eos_token_id, 30)
    assert sum(row is None for row in expected) == len(windows) >= 5
    assert len(rows) >= len(windows) + 10
    long = iter(windows)  # a long document gives the same window, packing or not
    assert rows.tolist() == [next(long) if row is None else row for row in expected]
    joined = [row for row, want in zip(rows, expected, strict=True) if want is not None]
    parts = [part for row in joined for part in tokenizer.decode(row).split("<|im_end|>") if part]
    assert all(any(text.startswith(part) for text in texts) for part in parts)
    assert len(set(parts)) == len(parts) > 2 * len(joined)


def test_packed_rows_open_with_the_begin_token_and_a_dialogue_keeps_its_own_end(tmp_path, tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE
    text = text_source(tmp_path / "a.jsonl", documents(8, 40, (2, 5)))
    settings = {"sequence_length": 60, "packing": True, "seed": 0}
    spoken = tokenizer.decode(
        pool(chat_source(tmp_path / "chat.jsonl", 40), tokenizer, tmp_path, **settings)[0]
    )
    assert re.match(r"User: question \d+\n\nAssistant: ?answer \d+<\|im_end\|>User: ", spoken)
    plain = pool(text, tokenizer, tmp_path, **settings)
    begin = with_begin_token(tokenizer)
    opened = pool(text, tokenizer, tmp_path, **settings)
    assert (opened[:, 0] == begin).all()
    assert begin not in opened[:, 1:]
    assert opened[0, 1:].tolist() == plain[0, :59].tolist()


def test_a_corpus_of_short_texts_serves_once_it_is_packed(tmp_path, tokenizer):
    source = text_source(tmp_path / "a.jsonl", documents(6, 80, (3, 5)))
    with pytest.raises(DataError, match=r"only 0 of 80 .* set calibration\.packing=true to join short"):
        pool(source, tokenizer, tmp_path, sequence_length=100)
    count = len(pool(source, tokenizer, tmp_path, sequence_length=100, packing=True))
    message = rf"80 documents fill only {count} calibration sequences of 100 tokens, but {count + 1} are"
    with pytest.raises(DataError, match=message) as raised:
        pool(source, tokenizer, tmp_path, sequence_length=100, packing=True, at_least=count + 1)
    assert "calibration.packing" not in str(raised.value)


def test_perplexity_windows_are_the_documents_in_order_joined_with_end_tokens(tmp_path, tokenizer):
    texts = documents(7, 30, (5, 40))
    source = text_source(tmp_path / "a.jsonl", texts)
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    path = tmp_path / "windows.safetensors"
    for wanted, given in ((5, 5), (10**6, len(stream) // 50)):
        assert write_perplexity_windows(source, tokenizer, windows=wanted, length=50, path=path) == given
        windows = load_file(path)["input_ids"]
        assert windows.dtype == np.int32
        assert windows.tolist() == np.reshape(stream[: given * 50], (given, 50)).tolist()
    with pytest.raises(DataError, match="does not fill one window of 99,999 tokens"):
        write_perplexity_windows(source, tokenizer, windows=1, length=99_999, path=path)


@pytest.mark.parametrize("begins", [False, True])
def test_sliding_windows_predict_each_token_of_the_text_once(tmp_path, tokenizer, begins):
    texts = documents(7, 30, (5, 40))
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    opening = [with_begin_token(tokenizer)] if begins else []
    source, path = text_source(tmp_path / "a.jsonl", texts), tmp_path / "windows.safetensors"
    body = 50 - len(opening)
    for stride in (1, 17, 49):
        written = write_perplexity_windows(source, tokenizer, windows=4, length=50, stride=stride, path=path)
        columns = load_file(path)
        windows, trained = columns["input_ids"].tolist(), columns["trained"].tolist()
        assert len(windows) == written == 1 + -(-3 * body // stride)
        predicted, at = [], 0
        for window, marks in zip(windows, trained, strict=True):
            new = sum(marks)
            assert marks == [0] * (50 - new) + [1] * new
            at += new
            assert window == opening + stream[at - body : at]  # as much context as there is room for
            predicted += window[50 - new :]
        assert predicted == stream[: 4 * body]


def test_calibration_and_perplexity_rows_open_with_the_begin_token(tmp_path, tokenizer):
    texts = documents(8, 30, (20, 40))
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    begin = with_begin_token(tokenizer)
    source = text_source(tmp_path / "a.jsonl", texts)
    path = tmp_path / "rows.safetensors"
    write_perplexity_windows(source, tokenizer, windows=9, length=16, path=path)
    windows = load_file(path)["input_ids"]
    for rows in (pool(source, tokenizer, tmp_path, sequence_length=16, at_least=30), windows):
        assert (rows[:, 0] == begin).all()
        assert begin not in rows[:, 1:]
    assert windows[:, 1:].reshape(-1).tolist() == stream[: 9 * 15]


def test_conversations_that_the_template_refuses_are_malformed_rows_of_a_text_to_measure_on(
    tmp_path, tokenizer
):
    source = chat_source(tmp_path / "a.jsonl", 40)
    refusing = "{% if '7' in messages[0].content %}{{ raise_exception('no 7') }}{% endif %}"
    tokenizer.chat_template = refusing + PLAIN_TEMPLATE
    with pytest.raises(DataError, match=r"4 of 40 rows are malformed.* a row: the chat .* it \(no 7\)\."):
        write_perplexity_windows(source, tokenizer, windows=99, length=16, path=tmp_path / "x")
    source = dataclasses.replace(source, max_malformed=0.1)
    assert write_perplexity_windows(source, tokenizer, windows=99, length=16, path=tmp_path / "x") > 9
