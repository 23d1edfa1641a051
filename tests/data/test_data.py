import gzip
import json
import random
from pathlib import Path

import datasets
import pytest

from core.data.locations import locate
from core.data.plain_text import merge_paragraphs
from core.data.rows import stream_rows
from core.data.texts import iter_conversations, iter_documents
from core.errors import DataError
from core.settings.texts import TextSource
from tests.support.texts import drawn

TEXTS = [f"document {n}: " + "word " * (n % 7) + "end" for n in range(40)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    """The same documents in every format, and nothing else."""
    rows = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(40))})
    folder = tmp_path / "data"
    folder.mkdir()
    rows.to_parquet(folder / "a.parquet")
    rows.to_csv(folder / "a.csv")
    rows.to_json(folder / "a.jsonl")
    (folder / "a.json").write_text(json.dumps(rows.to_list()))
    with gzip.open(folder / "b.jsonl.gz", "wb") as file:
        file.write((folder / "a.jsonl").read_bytes())
    rows.save_to_disk(folder / "saved")
    datasets.load_from_disk(folder / "saved").map(lambda row: {"text": row["text"].upper()})  # leaves cache-*
    assert list((folder / "saved").glob("cache-*.arrow"))
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that cannot be imported without failing."""
    root = tmp_path / "site" / "fragile_texts"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "inner" / "a.jsonl").write_text(json.dumps({"text": "inside"}))
    monkeypatch.syspath_prepend(root.parent)
    return root


def write_rows(path: Path, rows: list[dict]) -> TextSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path))


def test_locate_tells_files_folders_and_hub_ids_apart(tmp_path):
    (tmp_path / "a.txt").touch()
    assert locate(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    assert locate(str(tmp_path)) == tmp_path
    assert locate("no-such-owner/no-such-data") is None


def test_a_package_path_is_found_without_importing_the_package(package):
    assert locate("package:fragile_texts/inner/a.jsonl") == package / "inner" / "a.jsonl"
    assert locate("package:fragile_texts") == package
    assert list(iter_documents(TextSource(path="package:fragile_texts/inner"))) == ["inside"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("package:no_such_texts/a", "no Python package no_such_texts is installed"),
        ("package:fragile_texts/gone.txt", "there is no gone.txt in"),
        ("package:fragile_texts/../other", "without dots"),
        ("package:fragile.texts/a", "without dots"),
        ("package:", "without dots"),
    ],
)
def test_a_wrong_package_path_is_an_error_that_says_what_is_missing(package, path, says):
    with pytest.raises(DataError, match=says):
        locate(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.json", "b.jsonl.gz", "saved"])
def test_every_format_gives_the_same_documents_in_file_order(folder, name):
    source = TextSource(path=str(folder / name))
    assert list(iter_documents(source)) == TEXTS
    assert [row["number"] for row in stream_rows(source)] == list(range(40))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "saved"])
def test_the_seed_alone_decides_the_order(folder, name, tokenizer):
    source = TextSource(path=str(folder / name))
    orders = [drawn(source, tokenizer, seed=seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in [*orders, TEXTS]}) == 3
    assert sorted(orders[2]) == sorted(TEXTS)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_slices_of_a_file_are_disjoint_and_cover_it(folder, split):
    source = str(folder / "a.jsonl")
    head = list(iter_documents(TextSource(path=source, split=f"{split}[:90%]")))
    tail = list(iter_documents(TextSource(path=source, split=f"{split}[90%:]")))
    assert (head, tail) == (TEXTS[:36], TEXTS[36:])


def test_slices_of_a_text_file_are_disjoint_and_cover_it(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    paragraphs = [f"{n} " + "many words " * 190 for n in range(20)]
    file.write_text("\n\n".join(paragraphs))
    whole = [paragraph.strip() for paragraph in paragraphs]
    assert list(iter_documents(TextSource(path=str(file)))) == whole
    assert list(iter_documents(TextSource(path=str(file), split="train[:25%]"))) == whole[:5]
    assert list(iter_documents(TextSource(path=str(file), split="train[-15:]"))) == whole[5:]
    assert sorted(drawn(TextSource(path=str(file)), tokenizer, seed=3)) == sorted(whole)


def test_a_slice_that_is_none_is_an_error(folder):
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(DataError, match=r"train\[:x\]"):
            list(stream_rows(TextSource(path=str(folder / name), split="train[:x]")))


def test_a_file_that_changed_under_its_name_is_read_anew(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        for text in ("first", "other"):
            (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
            assert list(iter_documents(TextSource(path=str(tmp_path / name)))) == [text]


def test_merged_paragraphs_lose_no_words_and_break_where_the_text_does():
    rng = random.Random(0)
    lengths = (3, 40, 700, 2500)
    blocks = ["\n".join("ab " * (rng.choice(lengths) // 6) + "z" for _ in "xy") for _ in range(200)]
    text = " \n\n".join(blocks)
    documents = list(merge_paragraphs(text.splitlines(keepends=True)))
    assert " ".join(documents).split() == text.split()
    assert all(len(document) >= 1990 for document in documents[:-1])
    starts = {block.splitlines()[0] for block in blocks}
    assert all(document.splitlines()[0] in starts for document in documents)


def test_text_without_blank_lines_is_cut_at_line_ends_and_one_line_at_sentences():
    lines = [f"line {n} of a long poem\n" for n in range(2000)]
    documents = list(merge_paragraphs(lines))
    assert "\n".join(documents) + "\n" == "".join(lines)
    assert max(map(len, documents)) < 8100
    article = "".join(f"This is sentence number {n}. " for n in range(2000)).strip()
    documents = list(merge_paragraphs([article]))
    assert " ".join(documents) == article
    assert all(2000 <= len(document) < 2100 for document in documents[:-1])


def test_a_text_folder_ends_documents_with_files_and_an_empty_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    assert list(iter_documents(TextSource(path=str(tmp_path)))) == ["one", "two"]
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no data"):
        next(iter_documents(TextSource(path=str(tmp_path / "c.txt"))))


def test_a_folder_gives_only_the_files_of_the_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "train_sft-0", "test-00000-of-00001"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "validation").mkdir()
    write_rows(tmp_path / "validation" / "x.jsonl", [{"text": "val"}])

    def read(split: str) -> list[str]:
        return list(iter_documents(TextSource(path=str(tmp_path), split=split)))

    assert read("train") == ["train-00000-of-00002", "train-00001-of-00002"]
    assert read("train_sft") == ["train_sft-0"]
    assert read("validation[:1]") == ["val"]
    with pytest.raises(DataError, match="no split dev, but train, validation, test"):
        read("dev")


def test_a_folder_of_several_kinds_and_one_without_data_are_errors(folder, tmp_path):
    with pytest.raises(DataError, match=r"holds .*csv.*parquet"):
        list(stream_rows(TextSource(path=str(folder))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no .*parquet"):
        list(stream_rows(TextSource(path=str(tmp_path / "empty"))))
    (tmp_path / "a.bin").touch()
    with pytest.raises(DataError, match=r"\.bin files"):
        list(stream_rows(TextSource(path=str(tmp_path / "a.bin"))))


def test_a_corrupt_file_is_a_one_line_error(tmp_path):
    for name in ("a.parquet", "a.arrow", "a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe{ no such format" * 100)
        with pytest.raises(DataError, match=name) as caught:
            list(iter_documents(TextSource(path=str(tmp_path / name))))
        assert "\n" not in str(caught.value)


def test_empty_and_repeated_documents_are_left_out(tmp_path):
    texts = ["a", "", "b", "a", " \n", None, "c", "b"]
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert list(iter_documents(source)) == ["a", "b", "c"]


def test_a_missing_or_unfit_column_is_an_error_that_lists_the_columns(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"passage": "a", "title": "b", "words": ["c"]}])
    with pytest.raises(DataError, match="no column text, but passage, title, words"):
        next(iter_documents(source))
    with pytest.raises(DataError, match="column words holds list, not text"):
        next(iter_documents(TextSource(path=source.path, field="words")))
    with pytest.raises(DataError, match="column title holds str, not a list of messages"):
        next(iter_conversations(TextSource(path=source.path, format="chat", field="title")))


def test_conversations_of_every_layout_become_roles_and_contents(tmp_path):
    wanted = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    sharegpt = [{"from": a, "value": b} for a, b in [("system", "s"), ("human", "q"), ("gpt", "a")]]
    parts = [{**m, "content": [{"type": "text", "value": m["content"]}], "loss": 0.5} for m in wanted]
    for number, messages in enumerate([wanted, sharegpt, parts]):
        path = write_rows(tmp_path / f"{number}.jsonl", [{"m": messages}]).path
        assert list(iter_conversations(TextSource(path=path, format="chat", field="m"))) == [wanted]


def test_a_column_that_only_later_rows_have_is_there(tmp_path):
    rows = [{"q": f"question {n}", "a": "yes"} for n in range(1500)] + [
        {"q": "last", "more": "of it", "a": "no"}
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "a.jsonl"), "format": "instruction", "response_field": "a"}
    assert len(list(iter_conversations(TextSource(**source, prompt_fields=("q", "more"))))) == 1501
    with pytest.raises(DataError, match="has no column less, but q, a, more"):
        list(iter_conversations(TextSource(**source, prompt_fields=("q", "less"))))


def test_instructions_join_the_prompt_columns_that_hold_something(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        {"instruction": "Be silent.", "input": "", "output": ""},
    ]
    source = TextSource(
        path=write_rows(tmp_path / "a.jsonl", rows).path,
        format="instruction",
        prompt_fields=("instruction", "input"),
        response_field="output",
    )
    found = list(iter_conversations(source))
    assert [[m["content"] for m in messages] for messages in found] == [
        ["Add.\n\n1 2", "3"],
        ["Greet.", "Hello."],
    ]
    assert [m["role"] for m in found[0]] == ["user", "assistant"]


def test_an_unknown_layout_or_role_is_an_error_that_names_what_is_there(tmp_path):
    for message, says in [
        (
            {"speaker": "x", "words": "y"},
            r"speaker, words instead of role and content.*columns of the row: id, m",
        ),
        ({"role": "wizard", "content": "y"}, "'wizard' is not a known role"),
    ]:
        path = write_rows(tmp_path / "a.jsonl", [{"id": 1, "m": [message]}]).path
        with pytest.raises(DataError, match=says):
            next(iter_conversations(TextSource(path=path, format="chat", field="m")))


def test_what_is_neither_here_nor_a_hub_id_is_refused_without_asking_the_hub():
    for path in ("data/gone.jsonl", "/no/such/folder", "./gone", "s3://bucket/a", "gone.txt"):
        with pytest.raises(DataError, match="not a file or folder here"):
            next(stream_rows(TextSource(path=path)))


def test_an_unreachable_hub_is_a_one_line_error_with_advice(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for split in ("train", "train[:10%]"):
        with pytest.raises(DataError, match=r"no-owner/no-data cannot be read: .*network") as caught:
            next(stream_rows(TextSource(path="no-owner/no-data", split=split)))
        assert "\n" not in str(caught.value)


OBJECTS = '{"text": "a"}\n{"text": "b"}\n'
LISTS = [
    '[{"text": "a"}, {"text": "b"}]',
    '\ufeff[{"text": "a"},{"text": "b"}]\n \n',
    '[\n{"text": "a"},\n{"text": "b"}\n]\n',
    '[{"text": "a"}\n,{"text": "b"}]',
    '[{\n"text":\n"a"}, {"text": "b"}]',
    '["a",\n"b"]',
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("content", LISTS)
def test_a_list_in_one_line_or_in_several_is_read_as_one(tmp_path, content, suffix):
    (tmp_path / f"a.{suffix}").write_text(content)
    assert list(iter_documents(TextSource(path=str(tmp_path / f"a.{suffix}")))) == ["a", "b"]


@pytest.mark.parametrize(
    "first",
    [
        "[INFO] export started",
        "[]",
        "[1, 2]",
        '[{"text": "x"}]',
        "[2026-01-05] started",
        '["cut',
        "[1],",
        "[" * 9999,
    ],
)
def test_a_first_line_that_begins_no_list_is_one_malformed_row(tmp_path, caplog, first):
    (tmp_path / "a.jsonl").write_text(f"{first}\n{OBJECTS}")
    assert list(iter_documents(TextSource(path=str(tmp_path / "a.jsonl"), max_malformed=0.5))) == ["a", "b"]
    (shown,) = [record.message for record in caplog.records if "left out" in record.message]
    assert "row 1 is left out: it is" in shown
    with pytest.raises(DataError, match=r"1 of 3 rows are malformed"):
        list(iter_documents(TextSource(path=str(tmp_path / "a.jsonl"))))


def test_a_first_line_that_is_cut_short_is_one_malformed_row_whatever_the_file_is_called(tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "cut sho\n{OBJECTS}')
        source = TextSource(path=str(tmp_path / name), max_malformed=0.5)
        assert list(iter_documents(source)) == ["a", "b"]
    (tmp_path / "one.json").write_text('{\n  "text": "a"\n}\n')
    assert list(iter_documents(TextSource(path=str(tmp_path / "one.json")))) == ["a"]


@pytest.mark.parametrize("after", [OBJECTS, "]", " " * 2**21 + "x", "[]"], ids=["rows", "]", "far", "[]"])
def test_what_stands_behind_a_list_is_an_error(tmp_path, after):
    (tmp_path / "a.jsonl").write_text(f'[\n{{"text": "a"}}\n]{after}')
    with pytest.raises(
        DataError, match=r"a\.jsonl cannot be read: after the \] of its list it goes"
    ) as caught:
        list(iter_documents(TextSource(path=str(tmp_path / "a.jsonl"))))
    assert "\n" not in str(caught.value)


def test_a_line_that_is_longer_than_a_block_is_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr("core.data.json_files._LINE_BYTES", 16)  # ends in a space
    (tmp_path / "a.jsonl").write_text('[{"text": "many words are here"}, {"text": "b"}]')
    found = list(iter_documents(TextSource(path=str(tmp_path / "a.jsonl"))))
    assert found == ["many words are here", "b"]
