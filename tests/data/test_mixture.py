"""The slices of a training's phases: disjoint, in the shares of their sources, the same each time."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from core.data.mixture import slice_name, write_slices
from core.data.packing import PLAIN_TEMPLATE
from core.errors import DataError, StorageError
from core.settings.texts import TextSource
from tests.support.texts import chat_source, documents, pool, text_source, with_begin_token

pytestmark = pytest.mark.usefixtures("own_cache")


def read_slices(directory: Path, phases: int) -> tuple[np.ndarray, np.ndarray]:
    slices = [load_file(directory / slice_name(phase)) for phase in range(1, phases + 1)]
    ids = np.concatenate([tensors["input_ids"] for tensors in slices])
    return ids, np.concatenate([tensors["trained"] for tensors in slices])


@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_slices_are_disjoint_consecutive_parts_of_one_stream(tmp_path, tokenizer, packing):
    words = (2, 9) if packing == "whole" else (5, 60)  # none is cut
    texts = [documents(seed, 300, words) for seed in (1, 2)]
    sources = [text_source(tmp_path / f"{n}.jsonl", text) for n, text in enumerate(texts)]
    for name, sequences in (("parts", [3, 0, 40, 57]), ("whole", [100])):
        report = write_slices(
            sources,
            tokenizer,
            sequence_length=48,
            sequences=sequences,
            packing=packing,
            seed=5,
            directory=tmp_path / name,
        )
        assert (report.sequences, report.tokens) == (tuple(sequences), 4800)
    parts, whole = read_slices(tmp_path / "parts", 4), read_slices(tmp_path / "whole", 1)
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.shape == (100, 48)
        assert np.array_equal(ours, theirs)
    assert load_file(tmp_path / "parts" / slice_name(3))["input_ids"].shape == (40, 48)
    # One pass: every document, up to the cut at the end, stands whole in the stream and only once.
    found = tokenizer.decode(whole[0].reshape(-1)).split("<|im_end|>")[:-1]
    found = [text for text in found if text]  # padding is of the same token
    assert len(set(found)) == len(found) > 20
    assert set(found) <= set(texts[0] + texts[1])


@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_same_inputs_and_seed_give_the_same_bytes_and_another_seed_does_not(tmp_path, tokenizer, packing):
    sources = [text_source(tmp_path / f"{n}.jsonl", documents(n, 60, (5, 60))) for n in (1, 2)]
    contents = []
    for run, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(run)
        write_slices(
            sources,
            tokenizer,
            sequence_length=32,
            sequences=[10, 30],
            packing=packing,
            seed=seed,
            directory=folder,
        )
        pool(sources[0], tokenizer, folder, sequence_length=16, packing=True, documents=50, seed=seed)
        contents.append([path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()])
    assert len(contents[0]) == 3
    assert contents[0] == contents[1]
    assert all(one != other for one, other in zip(contents[0], contents[2], strict=True))


def test_token_shares_follow_the_weights_though_document_lengths_differ(tmp_path, tokenizer):
    sizes, weights = ((200, 300), (5, 10), (30, 60)), (1.0, 2.5, 1.5)
    sources = [
        text_source(tmp_path / f"{n}.jsonl", documents(n, 400, size), weight)
        for n, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    report = write_slices(
        sources,
        tokenizer,
        sequence_length=64,
        sequences=[700],
        packing="cut",
        seed=0,
        directory=tmp_path / "out",
    )
    ids, _ = read_slices(tmp_path / "out", 1)
    by_source = np.zeros(3)
    for document in tokenizer.decode(ids.reshape(-1)).split("<|im_end|>"):
        by_source[int(document.partition(":")[0] or 0)] += len(tokenizer.encode(document)) + 1
    longest = max(len(tokenizer.encode(text)) for text in documents(0, 400, sizes[0])) + 1
    for n, source in enumerate(report.sources):
        assert abs(source.tokens - weights[n] / 5 * 700 * 64) <= 2 * longest
        assert abs(source.tokens - by_source[n]) <= longest  # the last document is cut
        assert source.share == weights[n] / 5
        assert source.trained_tokens == source.tokens


def test_a_source_that_runs_dry_starts_over_in_another_order(tmp_path, tokenizer):
    texts = documents(3, 20, (10, 20))
    source = text_source(tmp_path / "a.jsonl", texts)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    report = write_slices(
        [source],
        tokenizer,
        sequence_length=10,
        sequences=[25 * tokens // 100],
        packing="cut",
        seed=0,
        directory=tmp_path,
    )
    ids, _ = read_slices(tmp_path, 1)
    found = tokenizer.decode(ids.reshape(-1)).split("<|im_end|>")
    passes = [found[start : start + 20] for start in (0, 20)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(texts)
    assert passes[0] != passes[1]
    (given,) = report.sources
    assert (given.passes, given.documents) == (3, len(found))


def test_shares_hold_in_packed_rows_too_and_the_padding_is_counted(tmp_path, tokenizer):
    sizes, weights = ((40, 60), (2, 5), (7, 14)), (1.0, 2.5, 1.5)
    sources = [
        text_source(tmp_path / f"{n}.jsonl", documents(n, 400, size), weight)
        for n, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    report = write_slices(
        sources,
        tokenizer,
        sequence_length=512,
        sequences=[40, 0, 50],
        packing="whole",
        seed=0,
        directory=tmp_path,
    )
    slices = [load_file(tmp_path / slice_name(phase)) for phase in (1, 3)]
    by_source, padding = np.zeros(3), 0
    for ids, starts in ((row, begin) for part in slices for row, begin in zip(*rows_of(part), strict=True)):
        for document in np.split(ids, starts.nonzero()[0])[1:]:
            length = int((document == tokenizer.eos_token_id).argmax()) + 1
            by_source[int(tokenizer.decode(document).partition(":")[0])] += length
            padding += len(document) - length
    tokens = 90 * 512
    assert by_source.sum() + padding == tokens
    assert report.padding == padding / tokens < 0.02
    assert np.abs(by_source / by_source.sum() - np.array(weights) / 5).max() < 0.02
    assert load_file(tmp_path / slice_name(2))["starts"].shape == (0, 512)


def rows_of(tensors):
    return tensors["input_ids"], tensors["starts"]


def test_whole_conversations_and_documents_open_with_one_begin_token_and_cut_ones_as_before(
    tmp_path, tokenizer
):
    begin = with_begin_token(tokenizer)
    chat = chat_source(tmp_path / "chat.jsonl", 50)
    text = text_source(tmp_path / "text.jsonl", documents(4, 50, (2, 90)))  # some longer than a row
    for template in (None, "{{ '<|im_start|>' }}" + PLAIN_TEMPLATE):
        tokenizer.chat_template = template
        write_slices(
            [chat, text],
            tokenizer,
            sequence_length=64,
            sequences=[30],
            packing="whole",
            seed=0,
            directory=tmp_path,
        )
        tensors = load_file(tmp_path / slice_name(1))
        opens = tensors["input_ids"] == begin
        assert np.array_equal(opens, tensors["starts"] == 1)
        assert opens[:, 0].all()
        assert not tensors["trained"][opens].any()
    tokenizer.chat_template = None
    write_slices(
        [chat],
        tokenizer,
        sequence_length=64,
        sequences=[9],
        packing="cut",
        seed=0,
        directory=tmp_path,
    )
    assert begin not in load_file(tmp_path / slice_name(1))["input_ids"]


@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_prompts_are_masked_in_the_slices_and_texts_are_not(tmp_path, tokenizer, packing):
    chat = chat_source(tmp_path / "chat.jsonl", 50)
    text = text_source(tmp_path / "text.jsonl", documents(4, 50, (10, 20)))
    tokenizer.chat_template = PLAIN_TEMPLATE
    report = write_slices(
        [chat, text],
        tokenizer,
        sequence_length=32,
        sequences=[40],
        packing=packing,
        seed=0,
        directory=tmp_path,
    )
    ids, trained = read_slices(tmp_path, 1)
    assert (ids.dtype, trained.dtype) == (np.int32, np.uint8)
    words = [set(re.findall("question|answer", tokenizer.decode(ids[trained == kind]))) for kind in (0, 1)]
    assert words == [{"question"}, {"answer"}]
    assert report.sources[0].trained_tokens < report.sources[0].tokens
    assert abs(report.sources[0].tokens - report.sources[1].tokens) < 100


def test_tokens_of_prompts_that_fill_whole_rows_are_neither_packed_nor_counted(tmp_path, tokenizer):
    rows = [{"q": f"{n} " + "long question " * 400, "a": f"answer {n}"} for n in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSource(
        path=str(tmp_path / "a.jsonl"), format="instruction", prompt_fields=("q",), response_field="a"
    )
    report = write_slices(
        [source], tokenizer, sequence_length=64, sequences=[8], packing="whole", seed=0, directory=tmp_path
    )
    _, trained = read_slices(tmp_path, 1)
    assert trained.any(axis=1).all()
    assert report.sources[0].tokens <= 64 * report.sources[0].documents  # of each the last piece or two


@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_sources_whose_caps_just_cover_the_sequences_fill_them(tmp_path, tokenizer, packing):
    sources = [
        dataclasses.replace(text_source(tmp_path / f"{n}.jsonl", documents(n, 80, (3, 9))), max_tokens="640")
        for n in (1, 2)
    ]

    def written(sequences):
        return write_slices(
            sources,
            tokenizer,
            sequence_length=64,
            sequences=sequences,
            packing=packing,
            seed=0,
            directory=tmp_path / packing,
        )

    report = written([12, 8])
    assert all(640 <= source.tokens < 680 for source in report.sources)
    given = sum(source.tokens for source in report.sources)
    said = rf"than the max_tokens of all training\.sources give, {given:,} tokens in 2\d of 30 sequences"
    with pytest.raises(DataError, match=said):
        written([30])


def talks_of(path, tokenizer, *, refused=0, empty=0):
    """A source of 200 conversations, of which the template refuses some, and some have no reply."""
    tokenizer.chat_template = PLAIN_TEMPLATE.replace(
        "{{ message.role.",
        "{% if 'BAD' in message.content %}{{ raise_exception('no BAD') }}{% endif %}{{ message.role.",
    )
    rows = [
        {"q": f"question {n}" + " BAD" * (n < refused), "a": "" if n >= 200 - empty else "so"}
        for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path), format="instruction", prompt_fields=("q",), response_field="a")


def one_slice(source, tokenizer, directory):
    return write_slices(
        [source], tokenizer, sequence_length=64, sequences=[60], packing="whole", seed=0, directory=directory
    ).sources[0]


def test_conversations_that_the_template_refuses_are_malformed_rows(tmp_path, tokenizer, caplog):
    report = one_slice(talks_of(tmp_path / "a.jsonl", tokenizer, refused=1), tokenizer, tmp_path)
    assert (report.passes > 1, report.empty) == (True, 0)
    assert report.passes - 1 <= report.malformed <= report.passes
    assert "row 1 is left out: the chat template refuses it (no BAD)" in caplog.text
    with pytest.raises(DataError, match=r"9 of 200 rows are malformed.*row \d: the chat .* it \(no BAD\)\."):
        one_slice(talks_of(tmp_path / "a.jsonl", tokenizer, refused=9), tokenizer, tmp_path)


@pytest.mark.parametrize(("empty", "warned"), [(2, 0), (50, 1)])
def test_rows_that_give_nothing_are_counted_and_many_are_one_warning(
    tmp_path, tokenizer, caplog, empty, warned
):
    report = one_slice(talks_of(tmp_path / "a.jsonl", tokenizer, empty=empty), tokenizer, tmp_path)
    assert report.passes > 1
    assert (report.passes - 1) * empty <= report.empty <= report.passes * empty
    assert report.malformed == 0
    shown = [record.message for record in caplog.records if "are empty" in record.message]
    assert len(shown) == warned
    assert all("rows are empty (no text, or no reply to train on) and left out" in said for said in shown)


def test_a_source_without_documents_is_an_error_that_names_it(tmp_path, tokenizer):
    full = text_source(tmp_path / "full.jsonl", documents(1, 5, (5, 9)))
    empty = text_source(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(DataError, match=r"empty\.jsonl holds no documents"):
        write_slices(
            [full, empty],
            tokenizer,
            sequence_length=8,
            sequences=[9],
            packing="whole",
            seed=0,
            directory=tmp_path,
        )
    assert not list((tmp_path / "slices").iterdir())
    rows = [{"messages": [{"role": "user", "content": "anyone?"}]}]
    (tmp_path / "mute.jsonl").write_text(json.dumps(rows[0]))
    mute = TextSource(path=str(tmp_path / "mute.jsonl"), format="chat", field="messages")
    with pytest.raises(DataError, match=r"mute\.jsonl holds no replies"):
        write_slices(
            [mute], tokenizer, sequence_length=8, sequences=[1], packing="whole", seed=0, directory=tmp_path
        )


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, tokenizer):
    source = text_source(tmp_path / "a.jsonl", documents(1, 5, (5, 9)))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        write_slices(
            [source],
            tokenizer,
            sequence_length=8,
            sequences=[1],
            packing="whole",
            seed=0,
            directory=tmp_path / "file",
        )
    (tmp_path / "out" / slice_name(1)).mkdir(parents=True)
    with pytest.raises(StorageError, match=r"phase-01\.safetensors cannot be written"):
        write_slices(
            [source],
            tokenizer,
            sequence_length=8,
            sequences=[1],
            packing="whole",
            seed=0,
            directory=tmp_path / "out",
        )
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["slices", "phase-01.safetensors"]


def test_slices_are_read_lazily_by_safetensors(tmp_path, tokenizer):
    source = text_source(tmp_path / "a.jsonl", documents(1, 50, (5, 9)))
    write_slices(
        [source], tokenizer, sequence_length=8, sequences=[6], packing="whole", seed=0, directory=tmp_path
    )
    with safe_open(tmp_path / "slices/phase-01.safetensors", framework="np") as file:
        assert set(file.keys()) == {"input_ids", "trained", "starts"}
        assert file.get_slice("input_ids")[2:4].shape == (2, 8)
