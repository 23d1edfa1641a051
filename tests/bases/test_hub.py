"""The Hugging Face hub, as its own client sees it: data sets are streamed, models pinned and taken up."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.numpy import load, load_file

from core.model.build import load_model, load_tokenizer
from core.storage.publication import open_publication
from tests.support.hub import Repository, run_hub

pytestmark = pytest.mark.slow  # a process that imports everything: 10 s on a busy machine

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"text": f"row {n} says {n * n}"} for n in range(60)]
TALKS = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(5)]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=7)
    return buffer.getvalue()


def datasets():
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("en", "de")]
    card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
    return {
        "team/lines": Repository(
            branches={
                "main": {
                    "README.md": b"# Lines\n",
                    "data/train-00000-of-00002.jsonl": json_lines(ROWS[:25]),
                    "data/train-00001-of-00002.jsonl": json_lines(ROWS[25:40]),
                    "data/test-00000-of-00001.jsonl": json_lines(ROWS[40:]),
                },
                "old": {"train.jsonl": json_lines(ROWS[:9])},
            }
        ),
        "team/columns": Repository(branches={"main": {"train.parquet": parquet(ROWS)}}),
        "team/tongues": Repository(
            branches={
                "main": {
                    "README.md": card.encode(),
                    "en/a.jsonl": json_lines([{"text": "good day"}]),
                    "de/a.jsonl": json_lines([{"text": "guten Tag"}]),
                }
            }
        ),
        "team/talks": Repository(
            branches={"main": {"train.jsonl": json_lines([{"messages": talk} for talk in TALKS])}}
        ),
        "team/secret": Repository(branches={"main": {"train.jsonl": json_lines(ROWS)}}, private=True),
        "team/gated": Repository(branches={"main": {"train.jsonl": json_lines(ROWS)}}, gated=True),
        "team/empty": Repository(branches={"main": {"README.md": b"# Nothing yet\n"}}),
    }


def twice(main):
    """A repository that holds its weights as shards and as one file that no index names."""
    files, whole = dict(main), main["model.safetensors"]
    del files["model.safetensors"]
    index = {"weight_map": dict.fromkeys(load(whole), "model-00001-of-00001.safetensors")}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return {**files, "model-00001-of-00001.safetensors": whole, "consolidated.safetensors": whole}


@pytest.fixture(scope="module")
def seen(project, tmp_path_factory):
    """What came of all calls, and the hub that was asked."""
    folder = tmp_path_factory.mktemp("hub")
    main = {path.name: path.read_bytes() for path in (project / "base").iterdir()}
    models = {
        "team/model": Repository(
            branches={
                "main": {**main, "README.md": b"# Model\n", "pytorch_model.bin": b"never read"},
                "v1": {
                    **main,
                    "LICENSE": b"free",
                    "README.md": b"---\nlicense: llama3.2\nlanguage: en\n---\n",
                },
            }
        ),
        "team/other-family": Repository(
            branches={"main": {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"x" * 9}}
        ),
        "team/twice": Repository(branches={"main": twice(main)}),
        "team/secret": Repository(branches={"main": main}, private=True),
        "team/pickles": Repository(
            branches={
                "main": {"config.json": main["config.json"], "pytorch_model.bin": main["model.safetensors"]}
            }
        ),
        "team/torn": Repository(
            branches={"main": {**main, "model.safetensors": main["model.safetensors"][:-9]}}
        ),
    }
    store, old = str(folder / "store"), datasets()["team/lines"].commit("old")
    cases = [
        ("ordered", "rows", ["team/lines"], {}),
        ("test split", "rows", ["team/lines"], {"split": "test"}),
        ("seed 1", "rows", ["team/lines"], {"seed": 1}),
        ("seed 1 again", "rows", ["team/lines"], {"seed": 1}),
        ("seed 2", "rows", ["team/lines"], {"seed": 2}),
        ("parquet", "documents", ["team/columns"], {}),
        ("parquet shuffled", "rows", ["team/columns"], {"seed": 1}),
        ("few", "few", ["team/lines", 6], {}),
        ("pinned", "rows", ["team/lines"], {"revision": old}),
        ("no revision", "rows", ["team/lines"], {"revision": "v9"}),
        ("slice", "rows", ["team/lines"], {"split": "train[10:30]"}),
        ("subset", "documents", ["team/tongues"], {"subset": "de"}),
        ("no subset", "documents", ["team/tongues"], {}),
        ("talks", "conversations", ["team/talks"], {}),
        ("pool", "pool", ["team/lines"], {"tokenizer": str(project / "base"), "to": str(folder / "pool")}),
        ("no column", "documents", ["team/lines"], {"field": "body"}),
        ("no split", "rows", ["team/lines"], {"split": "validation"}),
        ("private", "rows", ["team/secret"], {}),
        ("private, token", "with_token", ["rows", "team/secret"], {}),
        ("gated", "rows", ["team/gated"], {}),
        ("missing", "rows", ["team/gone"], {}),
        ("missing, token", "with_token", ["rows", "team/gone"], {}),
        ("empty", "rows", ["team/empty"], {}),
        ("model", "base", ["team/model"], {"store": store}),
        ("model again", "base", ["team/model"], {"store": store}),
        ("model v1", "base", ["team/model"], {"store": store, "revision": "v1"}),
        ("model v9", "base", ["team/model"], {"store": store, "revision": "v9"}),
        ("twice", "base", ["team/twice"], {"store": store}),
        ("other family", "base", ["team/other-family"], {"store": store}),
        ("private model", "base", ["team/secret"], {"store": store}),
        ("private model, token", "with_token", ["base", "team/secret"], {"store": store}),
        ("missing model", "base", ["team/gone"], {"store": store}),
        ("pickles", "base", ["team/pickles"], {"store": store}),
        ("torn", "base", ["team/torn"], {"store": store}),
        ("stop", "stop", [], {}),
        ("refused", "rows", ["team/columns"], {}),
        ("model refused", "base", ["team/model"], {"store": store}),
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    with run_hub(datasets=datasets(), models=models) as hub:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.hub_client", str(folder)],
            cwd=folder,
            env=own | hub.environment(str(folder / "cache")) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text()), hub, folder


@pytest.fixture
def value(seen):
    def value_of(name):
        answer = seen[0][name]
        assert "value" in answer, answer["text"]
        return answer["value"]

    return value_of


@pytest.fixture
def refusal(seen):
    """The text of an error that a user is shown, and its kind; it is one line."""

    def refusal_of(name):
        answer = seen[0][name]
        assert answer.get("error"), answer
        assert "\n" not in answer["text"]
        return answer["error"], answer["text"]

    return refusal_of


def test_rows_come_in_the_order_of_the_files(value):
    assert value("ordered") == ROWS[:40]
    assert value("test split") == ROWS[40:]
    assert value("parquet") == [row["text"] for row in ROWS]
    assert value("slice") == ROWS[10:30]
    assert value("subset") == ["guten Tag"]
    assert value("talks") == TALKS


def test_the_seed_alone_decides_the_order(value):
    orders = [[row["text"] for row in value(name)] for name in ("ordered", "seed 1", "seed 2")]
    assert orders[1] == [row["text"] for row in value("seed 1 again")]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3
    shuffled = [row["text"] for row in value("parquet shuffled")]
    assert sorted(shuffled) == sorted(value("parquet")) != shuffled


def test_no_more_is_kept_than_will_do_and_of_several_files(value):
    numbers = [ROWS.index(row) for row in value("few")]
    assert 6 <= len(set(numbers)) == len(numbers) <= 18
    assert {number < 25 for number in numbers} == {True, False}


def test_the_revision_is_read_that_a_source_names(value, refusal):
    assert value("pinned") == ROWS[:9]
    assert "v9" in refusal("no revision")[1]


def test_a_stream_is_not_stored(seen):
    _, _, folder = seen
    stored = [path.name for path in (folder / "cache").rglob("*") if path.is_file()]
    assert not [name for name in stored if name.endswith(".parquet")]


def test_calibration_draws_from_a_stream(seen, value, project):
    _, _, folder = seen
    rows, tokenizer = load_file(folder / "pool")["input_ids"], load_tokenizer(project / "base")
    assert rows.shape == (value("pool"), 12)
    texts = {row["text"] for row in ROWS[:40]}
    parts = [part for row in rows for part in tokenizer.decode(row).split(tokenizer.eos_token) if part]
    assert all(any(part in text for text in texts) for part in parts)
    whole = [part for part in parts if part in texts]
    assert len(set(whole)) == len(whole) >= 5


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("private", "Dataset 'team/secret' doesn't exist on the Hub or cannot be accessed"),
        ("missing", "Dataset 'team/gone' doesn't exist on the Hub or cannot be accessed"),
        ("missing, token", "Dataset 'team/gone' doesn't exist on the Hub or cannot be accessed"),
        ("gated", "is a gated dataset on the Hub. You must be authenticated to access it"),
        ("no split", "Bad split: validation. Available splits: ['train', 'test']"),
        ("no subset", "Please pick one among the available configs: ['en', 'de']"),
        ("empty", "doesn't contain any data files"),
        ("refused", "Couldn't reach 'team/columns' on the Hub"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_line_with_advice(refusal, name, says):
    kind, text = refusal(name)
    assert kind == "DataError"
    assert text.startswith("Hugging Face data set team/")
    assert says in text
    assert text.endswith("the network and (for a private or gated set) HF_TOKEN, or name a local file.")


def test_a_wrong_column_of_a_stream_is_named(refusal):
    text = "team/lines has no column body, but text. Name one of them in the recipe."
    assert refusal("no column") == ("DataError", text)


def test_a_token_opens_what_is_private(value, seen):
    _, hub, _ = seen
    assert value("private, token") == ROWS
    assert value("private model, token")[1] == hub.models["team/secret"].commit()


def test_a_model_is_pinned_to_its_commit_and_published(value, seen, project):
    _, hub, folder = seen
    repository = hub.models["team/model"]
    for name, branch, others in (
        ("model", "main", set()),
        ("model v1", "v1", {"LICENSE", "adapt_pruner.json"}),
    ):
        uri, revision = value(name)
        assert revision == repository.commit(branch)
        assert uri == str(folder / "store" / "bases" / revision)
        manifest = open_publication(uri).manifest
        wanted = {path.name for path in (project / "base").iterdir()} | others
        assert set(manifest.paths) == wanted  # no pickle, no README
        assert manifest.metadata == {"base": "team/model", "revision": revision}
        model, expected = load_model(Path(uri)).state_dict(), load_model(project / "base").state_dict()
        assert all(torch.equal(model[key], expected[key]) for key in expected)
    assert repository.commit("main") != repository.commit("v1")
    provenance = json.loads((Path(value("model v1")[0]) / "adapt_pruner.json").read_text())
    assert provenance == {"base": "team/model", "license": "llama3.2", "language": ["en"]}


def test_a_model_that_was_taken_up_is_not_downloaded_again(value, seen):
    _, hub, _ = seen
    assert value("model again") == value("model")
    commit = hub.models["team/model"].commit()
    downloads = [
        request for request in hub.requests if request.startswith(f"GET /team/model/resolve/{commit}")
    ]
    assert len(set(downloads)) == len(downloads) > 3
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_weights_that_the_index_does_not_name_are_not_downloaded(value, seen):
    _, hub, _ = seen
    weights = [name for name in open_publication(value("twice")[0]).manifest.paths if "safetensors" in name]
    assert weights == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    asked = [request for request in hub.requests if "/team/twice/resolve/" in request]
    assert any("model-00001-of-00001" in request for request in asked)
    assert not any("consolidated" in request for request in asked)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("model v9", "CheckpointError", "404 Client Error. Revision Not Found for url: "),
        ("missing model", "CheckpointError", "401 Client Error. Repository Not Found for url: "),
        ("private model", "CheckpointError", "401 Client Error. Repository Not Found for url: "),
        ("model refused", "CheckpointError", "Connection refused"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_line_with_advice(refusal, name, kind, says):
    found, text = refusal(name)
    assert found == kind
    assert says in text
    assert "Please make sure" not in text
    assert text.endswith("the network and, for a private or gated model, HF_TOKEN.")


def test_a_model_of_no_use_is_named_and_does_not_come_into_the_store(refusal, seen):
    _, hub, folder = seen
    assert refusal("other family")[0] == "UnsupportedModelError"
    assert not any("other-family/resolve" in r and "safetensors" in r for r in hub.requests)
    assert "with safetensors weights (pickles are never read)" in refusal("pickles")[1]
    assert "model.safetensors is not a valid safetensors file" in refusal("torn")[1]
    published = {path.name for path in (folder / "store" / "bases").iterdir()}
    models = hub.models
    good = {models[f"team/{name}"].commit() for name in ("model", "secret", "twice")}
    good.add(models["team/model"].commit("v1"))
    assert published == good
