"""prepare-data is killed, fails or meets changed texts, and is started again."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from core.data import mixture
from core.errors import StorageError
from core.runs.run import Run
from core.steps import parts as parts_module
from core.steps import prepare_data
from core.steps.parts import SavedParts
from core.storage.garbage import find_garbage
from core.storage.publication import open_publication
from core.storage.store import open_store
from tests.support.project import recipe_with, resolve

pytestmark = pytest.mark.slow

ROWS = 300
TALKS = [{"q": f"question {n} " + "long " * 90 * (n % 9 == 4), "a": "answer " * (n % 40)} for n in range(90)]


@pytest.fixture(params=["whole", "cut"])
def recipe(request, project, tmp_path):
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    source = {"path": str(talks), "format": "instruction", "prompt_fields": ["q"], "response_field": "a"}
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"{n} words of prose. " * (n % 37 + 20) for n in range(100)))
    changes = {
        "training.tokens": str(ROWS * 32),
        "training.packing": request.param,
        "training.sources": [{"path": "texts.jsonl"}, source, {"path": str(prose)}],
    }
    with contextlib.chdir(project):
        yield lambda store: recipe_with(
            changes | {"storage.store": store if "://" in store else str(tmp_path / store)}
        )


def prepared(recipe, **options):
    """The slices of a run, by name, and its report."""
    handle, base_uri = resolve(recipe)
    with patched(**options):
        data = open_publication(prepare_data.run_prepare_data(run=handle, base_uri=base_uri))
    report = data.read_json("report.json")
    del report["seconds"]
    return {entry.path: entry.sha256 for entry in data.manifest.files if "slices" in entry.path}, report


@contextlib.contextmanager
def patched(*, kind=SavedParts, most_bytes=4000, **options):
    whole, prepare_data.SavedParts = (
        prepare_data.SavedParts,
        functools.partial(kind, most_bytes=most_bytes, **options),
    )
    try:
        yield
    finally:
        prepare_data.SavedParts = whole


class Interrupted(SavedParts):
    """Ends the process, or the attempt, when so many rows are packed."""

    def __init__(self, *arguments, after, kill=False, **options):
        super().__init__(*arguments, **options)
        self._left, self._kill = after, kill

    def add(self, row):
        if not self._left:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        self._left -= 1
        return super().add(row)


def rows_packed(monkeypatch):
    """Count the rows that are packed from now on."""
    packed = []
    add = SavedParts.add
    monkeypatch.setattr(SavedParts, "add", lambda self, row: packed.append(row) or add(self, row))
    return packed


def test_it_goes_on_after_the_last_part_and_gives_the_same_bytes(recipe, monkeypatch, tmp_path):
    expected = prepared(recipe("whole"))
    assert len(expected[0]) == 2
    for after in (3, 61, 299):
        store = f"store-{after}"
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe(store), kind=Interrupted, after=after)
        packed = rows_packed(monkeypatch)
        assert prepared(recipe(store)) == expected
        monkeypatch.undo()
        row_bytes = len(packed[0])
        a_part = -(-4000 // row_bytes)  # rows
        assert len(packed) == 300 - after // a_part * a_part
        assert not list((tmp_path / store).rglob("_resume/*"))


def attempt(recipe, after):
    prepared(recipe, kind=Interrupted, after=after, kill=True)


def test_a_killed_process_is_followed_by_one_that_goes_on(recipe, monkeypatch):
    expected = prepared(recipe("whole"))
    process = multiprocessing.get_context("forkserver").Process(target=attempt, args=(recipe("store"), 200))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    packed = rows_packed(monkeypatch)
    assert prepared(recipe("store")) == expected
    assert len(packed) < 130


def test_copies_of_parts_that_were_read_leave_their_space_to_the_slices(recipe, s3_store_uri):
    fetched, left = [], []

    class Looking(SavedParts):
        def rows(self):
            fetched.extend(self._folder.glob("fetched-*"))
            return super().rows()

        def add(self, row):
            left.extend(self._folder.glob("fetched-*"))
            return super().add(row)

    with pytest.raises(KeyboardInterrupt):
        prepared(recipe(s3_store_uri), kind=Interrupted, after=200)
    prepared(recipe(s3_store_uri), kind=Looking)
    assert fetched
    assert not left


def test_parts_in_a_folder_stay_there_while_they_are_needed(recipe, tmp_path):
    seen = []

    class Looking(SavedParts):
        def rows(self):
            seen.append({*(tmp_path / "store").rglob("rows.bin")})
            return super().rows()

        def add(self, row):
            seen.append({*(tmp_path / "store").rglob("rows.bin")})
            return super().add(row)

    with pytest.raises(KeyboardInterrupt):
        prepared(recipe("store"), kind=Interrupted, after=200)
    prepared(recipe("store"), kind=Looking)
    assert seen[0]
    assert all(seen[0] <= later for later in seen[1:])


def test_several_interruptions_in_several_processes_change_nothing(recipe, monkeypatch):
    expected = prepared(recipe("whole"))
    for after in (90, 70, 50):
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe("store"), kind=Interrupted, after=after)
    monkeypatch.setattr(mixture, "_PARALLEL_TOKENS", 1)
    monkeypatch.setattr(prepare_data, "usable_cores", lambda: 2)
    assert prepared(recipe("store")) == expected


def test_texts_that_have_changed_are_prepared_from_the_start(recipe, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        prepared(recipe("store"), kind=Interrupted, after=100)
    talks = tmp_path / "talks.jsonl"
    talks.write_text(talks.read_text() + json.dumps(TALKS[5]) + "\n")
    result = prepared(recipe("store"))
    assert "the texts have changed" in caplog.text
    assert result == prepared(recipe("whole"))


@pytest.mark.parametrize("file", ["rows.bin", "position.safetensors", "MANIFEST.json"])
def test_a_damaged_part_is_not_used(recipe, tmp_path, caplog, file):
    with pytest.raises(KeyboardInterrupt):
        prepared(recipe("store"), kind=Interrupted, after=200)
    (first,) = (tmp_path / "store").rglob(f"_resume/000001/{file}")
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    assert prepared(recipe("store")) == prepared(recipe("whole"))
    assert "what an earlier attempt has packed is not used" in caplog.text


def test_a_part_whose_answer_was_lost_loses_no_rows(recipe, monkeypatch):
    expected, real = prepared(recipe("whole")), parts_module.publish
    lost = []

    def losing(*arguments, **options):
        published = real(*arguments, **options)
        if not lost:
            lost.append(published)
            raise StorageError("the answer was lost.")
        return published

    monkeypatch.setattr(parts_module, "publish", losing)
    with pytest.raises(KeyboardInterrupt):
        prepared(recipe("store"), kind=Interrupted, after=200)
    assert prepared(recipe("store")) == expected


def test_a_store_that_takes_no_part_costs_no_result(recipe, monkeypatch, caplog):
    expected, real = prepared(recipe("whole")), parts_module.publish
    tries = []

    def at_times(*arguments, **options):
        tries.append(1)
        if len(tries) % 3:
            raise StorageError("it is away.")
        return real(*arguments, **options)

    monkeypatch.setattr(parts_module, "publish", at_times)
    with pytest.raises(KeyboardInterrupt):
        prepared(recipe("store"), kind=Interrupted, after=250)
    assert "packed, but not kept: it is away." in caplog.text
    packed = rows_packed(monkeypatch)
    assert prepared(recipe("store")) == expected
    assert 0 < len(packed) < 300


def test_parts_are_garbage_once_the_data_is_published(recipe, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        prepared(recipe("store"), kind=Interrupted, after=200)
    store = open_store(str(tmp_path / "store"))
    assert not [piece for piece in find_garbage(store, job="job").garbage if "_resume" in str(piece)]
    monkeypatch.setattr(prepare_data, "remove_states", lambda uri: None)
    monkeypatch.setattr(SavedParts, "discard", lambda self: None)
    prepared(recipe("store"))
    found = [piece for piece in find_garbage(store, job="job").garbage if "_resume" in str(piece)]
    assert found
    assert "prepared data that is published" in str(found[0])


def test_a_short_preparation_keeps_no_parts(recipe, monkeypatch):
    published = []
    monkeypatch.setattr(parts_module, "publish", lambda *arguments, **_: published.append(arguments))
    handle, base_uri = resolve(recipe("store"))
    prepare_data.run_prepare_data(run=handle, base_uri=base_uri)
    assert not published
    report = open_publication(Run.load(handle).uri("data")).read_json("report.json")
    assert report["malformed"] == 0
    names = [Path(source["path"]).name for source in report["sources"]]
    assert names == ["texts.jsonl", "talks.jsonl", "prose.txt"]
