"""Hugging Face data sets are pinned when a run begins, once for each recipe in a store."""

import contextlib
import dataclasses
import json

import pytest

from core.data.rows import stream_rows
from core.errors import DataError, StorageError
from core.experiments.collecting import NOT_STARTED, find_runs
from core.experiments.definition import Cell
from core.runs.run import Run
from core.settings.recipe import settings_from_dict
from core.settings.texts import TextSource
from core.storage.garbage import find_garbage
from core.storage.store import open_store
from tests.support.hub import Repository, run_hub
from tests.support.project import recipe_with, resolve


def lines(count):
    return {"train.jsonl": "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(count)).encode()}


MEASURED = {"evaluation": {"perplexity": {"path": "team/lines"}}}


@pytest.fixture
def hub(monkeypatch):
    repository = Repository(branches={"main": lines(3), "v1": lines(2)}, tags=("v1",))
    with run_hub(datasets={"team/lines": repository}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def recipe(project, tmp_path):
    with contextlib.chdir(project):
        yield lambda **changes: recipe_with(
            {
                "storage.store": str(tmp_path / "store"),
                "training.sources": [{"path": "team/lines", **changes}],
            }
        )


def source_of(handle):
    (source,) = Run.load(handle).settings.training.sources
    return source


def test_a_run_keeps_the_commit_that_it_began_with_and_another_revision_is_another_run(hub, recipe):
    repository = hub.datasets["team/lines"]
    first, _ = resolve(recipe())
    begun = repository.commit()
    assert source_of(first) == TextSource(path="team/lines", revision=begun)
    repository.branches["main"] = lines(4)
    again, _ = resolve(recipe())
    assert again["key"] == first["key"]
    assert source_of(again).revision == begun != repository.commit()
    tagged, _ = resolve(recipe(revision="v1"))
    assert source_of(tagged).revision == repository.commit("v1")
    assert tagged["key"] != first["key"]
    exact, _ = resolve(recipe(revision=begun))
    assert exact["key"] == first["key"]


def test_an_experiment_finds_the_run_that_was_pinned(hub, recipe, tmp_path):
    def found(**changes):
        cell = Cell(labels={}, settings=settings_from_dict(recipe(**changes) | MEASURED))
        return find_runs([cell], open_store(str(tmp_path / "store")))[cell.key]

    assert found(revision="v1") is NOT_STARTED
    resolve(recipe(revision="v1") | MEASURED)
    handle, _ = resolve(recipe() | MEASURED)
    hub.datasets["team/lines"].branches["main"] = lines(4)
    requests = len(hub.requests)
    assert found().run.key == handle["key"] != found(revision="v1").run.key
    assert found().run.settings.evaluation.perplexity.revision == source_of(handle).revision
    assert len(hub.requests) == requests
    assert found(split="train[:2]") is NOT_STARTED


def test_another_store_takes_the_newest(hub, recipe, tmp_path):
    first, _ = resolve(recipe())
    hub.datasets["team/lines"].branches["main"] = lines(4)
    other, _ = resolve(recipe() | {"storage": {"store": str(tmp_path / "other")}})
    assert source_of(other).revision == hub.datasets["team/lines"].commit()
    assert other["key"] != first["key"]


def test_files_here_are_not_pinned_and_keep_their_keys(hub, project, tmp_path):
    with contextlib.chdir(project):
        handle, _ = resolve(recipe_with({"storage.store": str(tmp_path / "store")}))
    run = Run.load(handle)
    assert run.settings.training.sources == (TextSource(path="texts.jsonl"),)
    assert not (tmp_path / "store/revisions").exists()
    assert not hub.requests


@pytest.mark.parametrize(
    ("path", "changes", "says"),
    [
        ("team/gone", {}, r"Hugging Face data set team/gone cannot be read: .*401"),
        (
            "team/lines",
            {"revision": "v9"},
            r"Hugging Face data set team/lines cannot be read: .*404",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_one_line_when_the_run_begins(hub, recipe, path, changes, says):
    with pytest.raises(DataError, match=says) as caught:
        resolve(recipe(**changes, path=path))
    assert "\n" not in str(caught.value)


def test_a_damaged_note_is_an_error_and_cleaning_leaves_notes_alone(hub, recipe, tmp_path):
    resolve(recipe())
    (note,) = (tmp_path / "store/revisions").iterdir()
    store = open_store(str(tmp_path / "store"))
    findings = find_garbage(store)
    assert not [text for text in map(str, [*findings.garbage, *findings.foreign]) if "revisions" in text]
    note.write_text("{}")
    with pytest.raises(StorageError, match=r"revisions/.* is damaged: it lacks revision\. Set its revision"):
        resolve(recipe())


def test_the_pinned_revision_is_what_is_read(monkeypatch):
    asked = {}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **options: asked.update(options) or iter([]))
    source = TextSource(path="team/lines", revision="abc")
    for wanted in (source, dataclasses.replace(source, split="train[:5]")):
        with contextlib.suppress(Exception):
            list(stream_rows(wanted))
        assert asked.pop("revision") == "abc"
