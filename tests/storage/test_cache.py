"""A disk that tasks share: one download serves all, and nothing that happens to it harms a run."""

import hashlib
import os
import shutil

import pytest

from core.storage.cache import CACHE, FileCache
from core.storage.manifest import FileEntry
from core.storage.publication import open_publication, publish
from tests.support.disks import read_only, tiny_disk
from tests.support.publications import behind, read

LARGE, OTHER = bytes(range(256)) * 4096, bytes(reversed(range(256))) * 4096  # 1 MiB each
CONTENT = {"model-1.safetensors": LARGE, "folder/model-2.safetensors": OTHER, "config.json": b"{}"}


@pytest.fixture
def shared(tmp_path, monkeypatch):
    folder = tmp_path / "shared"
    monkeypatch.setenv(CACHE, str(folder))
    set_free(monkeypatch, 0.5)  # however full this machine's disk is
    return folder


def set_free(monkeypatch, share):
    size = 10**12
    usage = type(shutil.disk_usage("/"))(size, round(size * (1 - share)), round(size * share))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@pytest.fixture
def uri(s3_store_uri, checkpoint):
    publish(checkpoint, s3_store_uri)
    return s3_store_uri


@pytest.fixture
def asked(s3_server, monkeypatch):
    """Names of the files that the server was asked for, in the order of the requests."""
    names = []

    def see(request, forward):
        name = request.path.partition("?")[0].rpartition("/")[2]
        if request.method == "GET" and name in ("model-1.safetensors", "model-2.safetensors"):
            names.append(name)
        return forward()

    with behind(s3_server, see, monkeypatch):
        yield names


def kept_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fetch(uri, folder):
    return read(open_publication(uri).fetch(folder))


def entry_of(data):
    return FileEntry(path="model", size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_one_download_serves_all_who_share_a_disk(uri, shared, asked, tmp_path, caplog):
    caplog.set_level("INFO")
    assert fetch(uri, tmp_path / "first") == CONTENT
    assert sorted(asked) == ["model-1.safetensors", "model-2.safetensors"]
    assert [file.read_bytes() for file in kept_in(shared)] in ([LARGE, OTHER], [OTHER, LARGE])
    caplog.clear()
    for task in ("second", "third"):
        assert fetch(uri, tmp_path / task) == CONTENT
    assert len(asked) == 2
    assert caplog.text.count("copied from the node's cache, not from s3://") == 2
    assert caplog.text.count("2 files, 2.1 MB") == 2


def test_without_a_shared_disk_each_fetches(uri, asked, tmp_path, monkeypatch):
    monkeypatch.delenv(CACHE, raising=False)
    for task in ("first", "second"):
        assert fetch(uri, tmp_path / task) == CONTENT
    assert len(asked) == 4


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b"short"), lambda file: file.write_bytes(bytes(len(LARGE)))]
)
def test_what_is_damaged_there_is_fetched_and_kept_again(uri, shared, asked, tmp_path, caplog, damage):
    fetch(uri, tmp_path / "first")
    for file in kept_in(shared):
        damage(file)
    assert fetch(uri, tmp_path / "second") == CONTENT
    assert caplog.text.count("is damaged: ") == 2
    assert len(asked) == 4
    assert fetch(uri, tmp_path / "third") == CONTENT
    assert len(asked) == 4


def test_a_task_that_writes_to_its_files_changes_nobody_elses(uri, shared, tmp_path):
    fetch(uri, tmp_path / "first")
    fetch(uri, tmp_path / "second")
    for task in ("first", "second"):
        for name in CONTENT:
            (tmp_path / task / name).write_bytes(b"other")
    assert fetch(uri, tmp_path / "third") == CONTENT


def test_a_disk_that_cannot_be_written_costs_a_warning(uri, shared, asked, tmp_path, caplog):
    shared.mkdir()
    with read_only(shared):
        for task in ("first", "second"):
            assert fetch(uri, tmp_path / task) == CONTENT
    assert len(asked) == 4
    assert caplog.text.count(f"the cache in {shared} is not used, ") == 2, "once a fetch, not once a file"


def test_a_disk_that_others_have_filled_costs_a_warning(uri, shared, asked, tmp_path, monkeypatch, caplog):
    set_free(monkeypatch, 0.1)
    for task in ("first", "second"):
        assert fetch(uri, tmp_path / task) == CONTENT
    assert len(asked) == 4
    assert not kept_in(shared)
    assert caplog.text.count(f"the cache in {shared} has no room for ") == 2, "once a fetch, not once a file"
    assert "100.0 GB are free, and 10% of the 1.0 TB of the disk stay so" in caplog.text


def test_a_file_in_place_of_the_folder_costs_a_warning(uri, shared, tmp_path, caplog):
    shared.write_bytes(b"")
    assert fetch(uri, tmp_path / "first") == CONTENT
    assert caplog.text.count(f"the cache in {shared} is not used, ") == 1


def test_what_was_used_longest_ago_makes_room(tmp_path):
    contents = [bytes([n]) * 2**20 for n in range(4)] + [bytes(4 * 2**20)]
    entries = [entry_of(data) for data in contents]
    with tiny_disk(tmp_path / "disk", "4m") as disk:
        cache = FileCache(disk)

        def keep(n):
            (tmp_path / "file").write_bytes(contents[n])
            cache.keep(entries[n], tmp_path / "file")

        def there():
            return {n for n, entry in enumerate(entries) if (disk / entry.sha256[:2] / entry.sha256).exists()}

        for n in range(3):
            keep(n)
            for file in disk.glob(f"*/{entries[n].sha256}"):
                os.utime(file, (100 + n, 100 + n))
        assert cache.take(entries[0], tmp_path / "taken")  # now the newest
        assert (tmp_path / "taken").read_bytes() == contents[0]
        keep(3)
        assert there() == {0, 2, 3}
        assert shutil.disk_usage(disk).free >= 0.1 * 4 * 2**20
        keep(4)  # nothing has to go for what would not fit
        assert there() == {0, 2, 3}


def test_what_a_killed_copy_has_left_makes_room_first(tmp_path):
    with tiny_disk(tmp_path / "disk", "4m") as disk:
        left = disk / "ab" / f".{'ab' * 32}.0123abcd.part"
        left.parent.mkdir()
        left.write_bytes(bytes(3 * 2**20))
        os.utime(left, (1, 1))
        (tmp_path / "file").write_bytes(LARGE)
        FileCache(disk).keep(entry_of(LARGE), tmp_path / "file")
        assert FileCache(disk).take(entry_of(LARGE), tmp_path / "taken")
        assert not left.exists()


def test_small_files_are_left_to_the_store(tmp_path):
    (tmp_path / "file").write_bytes(b"small")
    FileCache(tmp_path / "shared").keep(entry_of(b"small"), tmp_path / "file")
    assert not (tmp_path / "shared").exists()
