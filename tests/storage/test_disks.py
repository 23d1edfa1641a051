"""Disks that are full or cannot be written: on this machine, and under a real S3 server."""

import contextlib
import random
import time

import pytest

from core.errors import StorageError
from core.storage.publication import find_publication, open_publication, publish
from core.storage.store import open_store
from tests.support.disks import as_nobody, fill, limited, read_only, resize, tiny_disk
from tests.support.evidence import note
from tests.support.publications import fetch, read, write
from tests.support.servers import BUCKET, s3_server

CONTENT = {
    "config.json": b"{}",
    "model.safetensors": random.Random(0).randbytes(2_000_000),
    "tokenizer/vocab.txt": b"a\nb\n" * 1000,
}


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "checkpoint", CONTENT)


def refused(call, match):
    with pytest.raises(StorageError, match=match) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def names_a_file_of(folder, message):
    """Files are written side by side: the first that finds the disk full is any of them."""
    return any(f"{folder}/{name} cannot be read or written" in message for name in CONTENT)


def test_a_store_on_a_full_disk_publishes_nothing_and_a_rerun_completes(checkpoint, tmp_path):
    with tiny_disk(tmp_path / "disk") as disk:
        uri = str(disk / "store")
        message = refused(lambda: publish(checkpoint, uri), "no space left on device. Free space")
        assert names_a_file_of(uri, message)
        assert find_publication(uri) is None
        assert list(open_store(uri).unfinished()) == []
        resize(disk, "4m")
        publish(checkpoint, uri)
        assert read(open_publication(uri).fetch(tmp_path / "fetched")) == CONTENT
    note("Faults", "a full disk under a store in a folder", "one line; nothing published; a rerun published")


def test_a_fetch_to_a_full_disk_leaves_no_half_file_and_a_rerun_completes(s3_store_uri, checkpoint, tmp_path):
    publish(checkpoint, s3_store_uri)
    with tiny_disk(tmp_path / "disk") as disk:
        target = disk / "fetched"
        message = refused(
            lambda: open_publication(s3_store_uri).fetch(target), "no space left on device. Free space"
        )
        assert names_a_file_of(target, message)
        assert {path.name for path in target.rglob("*")} <= {"config.json", "tokenizer", "vocab.txt"}
        assert read(target).items() <= CONTENT.items()
        resize(disk, "4m")
        assert read(open_publication(s3_store_uri).fetch(target)) == CONTENT
    note("Faults", "a full disk under a fetch", "one line; no half file; a rerun fetched the rest")


def test_small_writes_to_a_full_disk_change_nothing(tmp_path):
    with tiny_disk(tmp_path / "disk") as disk:
        store = open_store(disk / "store")
        store.write_bytes("run.json", b"before")
        filler = fill(disk)
        refused(lambda: store.write_bytes("run.json", b"after" * 2000), "no space left on device. Free space")
        refused(lambda: store.write_bytes("new.json", b"x" * 10_000, if_absent=True), "Free space")
        assert store.read_bytes("run.json") == b"before"
        assert list(store.list()) == ["run.json"]
        assert list(store.unfinished()) == []
        filler.unlink()
        store.write_bytes("run.json", b"after" * 2000)
        assert store.read_bytes("run.json") == b"after" * 2000
    note("Faults", "a full disk under small writes", "one line; the old bytes stay")


def test_a_limit_on_the_size_of_files_is_one_line(s3_store_uri, checkpoint, tmp_path):
    publish(checkpoint, s3_store_uri)
    store, target = tmp_path / "store", tmp_path / "fetched"
    for text in (limited(publish, checkpoint, str(store)), limited(fetch, s3_store_uri, target)):
        assert text.startswith("StorageError: ")
        assert "model.safetensors cannot be read or written: file too large. Free space" in text
    assert find_publication(str(store)) is None
    assert not [path for path in (*store.rglob("*"), *target.rglob("*")) if path.name.startswith((".", "m"))]
    publish(checkpoint, str(store))
    assert read(store) == read(open_publication(s3_store_uri).fetch(target)) == CONTENT
    note("Faults", "a limit on the size of files (store, fetch)", "one line; no half file; a rerun completed")


@pytest.mark.parametrize("how", ["a file system that is read-only", "a folder of another user"])
def test_a_store_or_a_target_that_cannot_be_written_is_one_line(checkpoint, tmp_path, how):
    store, target = tmp_path / "store", tmp_path / "target"
    publish(checkpoint, str(store / "there"))
    target.mkdir()

    def every_write():
        for call in (
            lambda: publish(checkpoint, str(store / "new")),
            lambda: open_store(store).write_bytes("run.json", b"x"),
            lambda: open_store(store).delete("there/config.json"),
        ):
            refused(call, "Check its owner and permissions, or use another folder")

    def reads():
        assert read(open_publication(str(store / "there")).fetch(target)) == CONTENT
        publish(checkpoint, str(store / "there"))  # it is there

    if how.startswith("a file system"):
        with read_only(store):
            every_write()
            reads()
    else:
        for folder in (tmp_path, *tmp_path.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(0o755)
        assert as_nobody(every_write) == ""
        assert as_nobody(reads) == ""
    publish(checkpoint, str(store / "new"))
    assert read(store / "new") == CONTENT
    note("Faults", f"a store in {how}", "reads went on; writes: one line; a rerun published")


def test_a_target_that_cannot_be_written_is_one_line(s3_store_uri, checkpoint, tmp_path):
    publish(checkpoint, s3_store_uri)
    target = tmp_path / "target"
    target.mkdir()
    with read_only(target):
        refused(
            lambda: open_publication(s3_store_uri).fetch(target),
            "Check its owner and permissions, or use another folder",
        )
    assert list(target.iterdir()) == []
    assert read(open_publication(s3_store_uri).fetch(target)) == CONTENT
    note("Faults", "a fetch to a file system that is read-only", "one line; a rerun fetched")


@pytest.mark.slow
def test_a_server_whose_disk_is_full_is_one_line_and_a_rerun_completes(tmp_path, monkeypatch):
    is_published = False
    big = {"model.safetensors": random.Random(1).randbytes(20_000_000), "config.json": b"{}"}
    with tiny_disk(tmp_path / "disk", "60m") as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with s3_server() as server:
            monkeypatch.setattr("tempfile.tempdir", None)
            for name, value in (server.environment() | {"AWS_MAX_ATTEMPTS": "3"}).items():
                monkeypatch.setenv(name, value)
            uri = f"s3://{BUCKET}/x"
            filler = fill(disk)
            message = refused(lambda: publish(write(tmp_path / "big", big), uri), "cannot be written: ")
            assert message.endswith("answers 500 InternalError. Check the server, then rerun to resume.")
            assert find_publication(uri) is None
            filler.unlink()
            until = time.monotonic() + 150
            while not is_published:  # the server looks at its disk once a minute
                with contextlib.suppress(*[StorageError] if time.monotonic() < until else []):
                    publish(tmp_path / "big", uri)
                    is_published = True
            assert read(open_publication(uri).fetch(tmp_path / "fetched")) == big
    note("Faults", "a full disk under the S3 server", "one line; nothing published; a rerun published")
