import concurrent.futures
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import StorageError
from core.storage.publication import OWN, Manifest, find_publication, open_publication, publish
from core.storage.store import open_store
from core.storage.transfer import upload_beside
from tests.support.evidence import note
from tests.support.publications import (
    CONTENT,
    RIVAL,
    backend,
    behind,
    die_before_the_manifest,
    read,
    write,
)
from tests.support.servers import Reply, Request


@pytest.mark.parametrize("a_dead_publisher_was_first", [False, True])
def test_of_eight_publishers_one_wins_and_readers_see_it_whole(uri, tmp_path, a_dead_publisher_was_first):
    contents = [{"a": bytes([n]) * 999, "b": bytes([n]) * 99_999, "c": bytes([n])} for n in range(4)]
    if a_dead_publisher_was_first:
        publish(write(tmp_path / "dead", {"a": b"dead", "d": b"dead"}), uri)
        die_before_the_manifest(uri)
    start, done = threading.Barrier(9), threading.Event()

    def run(publisher: int) -> Manifest:
        directory = write(tmp_path / f"publisher-{publisher}", contents[publisher % 4])
        start.wait()
        return publish(directory, uri)

    def watch() -> None:
        start.wait()
        while not done.is_set():
            if find_publication(uri) is not None:
                folder = open_publication(uri).fetch(tmp_path / "watched")
                assert {name: (folder / name).read_bytes() for name in "abc"} in contents

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        watcher = pool.submit(watch)
        try:
            publications = list(pool.map(run, range(8)))
        finally:
            done.set()
        watcher.result()
    winner = publications[0].manifest
    assert all(published == publications[0] for published in publications)
    note(
        "Publishing",
        "eight publishers of four contents at once"
        + (", after one that died" if a_dead_publisher_was_first else "")
        + backend(uri),
        "one won, all returned its manifest, and every reader saw one whole content",
    )
    left = set(open_store(uri).list()) - {"MANIFEST.json", *(winner.key(entry) for entry in winner.files)}
    assert left <= {"a", "b", "c", "d", "_UPLOADED.json"}, "losers remove the folders that only they know"
    assert read(open_publication(uri).fetch(tmp_path / "fetched")) in [dict(content) for content in contents]


def test_a_rival_that_uploads_before_the_manifest_is_put_corrupts_nothing(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    both_have_uploaded = threading.Barrier(2, timeout=30)

    def hold_publications(request, forward):
        if request.method == "PUT" and request.path.endswith("MANIFEST.json"):
            both_have_uploaded.wait()
        return forward()

    rival = write(tmp_path / "rival", RIVAL)
    with behind(s3_server, hold_publications, monkeypatch), concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda directory: publish(directory, s3_store_uri), [checkpoint, rival])
    assert one == two
    assert read(open_publication(s3_store_uri).fetch(tmp_path / "fetched")) in (CONTENT, RIVAL)
    note(
        "Publishing", "two publishers have stored all files when the first puts its manifest (s3)", "one won"
    )


def test_a_rerun_after_a_crash_publishes_what_it_has(uri, checkpoint, tmp_path):
    publish(write(tmp_path / "rival", RIVAL), uri)
    die_before_the_manifest(uri)
    assert publish(checkpoint, uri) == open_publication(uri)
    assert read(open_publication(uri).fetch(tmp_path / "fetched")) == CONTENT


def count_requests(seen: list[tuple[str, str]]) -> Callable[[Request, Callable[[], Reply]], Reply]:
    def count(request: Request, forward: Callable[[], Reply]) -> Reply:
        seen.append((request.method, request.path.partition("?")[0].rpartition("/")[2]))
        return forward()

    return count


def interrupt(s3_server, uri, checkpoint, monkeypatch, last):
    """Let a publication fail when it comes to the file ``last``."""

    def fail_at_last(request, forward):
        return Reply(status=500) if request.path.endswith(last) else forward()

    match = f"{last} cannot be"
    with behind(s3_server, fail_at_last, monkeypatch, attempts=1), pytest.raises(StorageError, match=match):
        publish(checkpoint, uri)
    assert find_publication(uri) is None


def test_an_interrupted_publication_goes_on(s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch):
    interrupt(s3_server, s3_store_uri, checkpoint, monkeypatch, "tokenizer/vocab.txt")
    seen: list[tuple[str, str]] = []
    with behind(s3_server, count_requests(seen), monkeypatch):
        published = publish(checkpoint, s3_store_uri)
    moved = [name for method, name in seen if method in ("PUT", "GET") and name not in OWN]
    assert moved == ["vocab.txt"]
    note(
        "Publishing",
        "a publication cut short, and started again (s3)",
        "only the file that was missing moved",
    )
    assert published.manifest.folder == ""
    assert sorted(open_store(s3_store_uri).list()) == sorted(["MANIFEST.json", *CONTENT])
    assert read(open_publication(s3_store_uri).fetch(tmp_path / "fetched")) == CONTENT


@pytest.mark.parametrize("damage", ["{", "[]", '{"config.json": 7}', '{"config.json": "00"}'])
def test_a_damaged_record_of_an_interrupted_publication_does_no_harm(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, damage
):
    interrupt(s3_server, s3_store_uri, checkpoint, monkeypatch, "tokenizer/vocab.txt")
    open_store(s3_store_uri).write_bytes("_UPLOADED.json", damage.encode())
    publish(checkpoint, s3_store_uri)
    assert read(open_publication(s3_store_uri).fetch(tmp_path / "fetched")) == CONTENT


def test_what_an_interrupted_publication_has_lost_since_is_uploaded_again(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    interrupt(s3_server, s3_store_uri, checkpoint, monkeypatch, "tokenizer/vocab.txt")
    open_store(s3_store_uri).delete("model-00002.safetensors")
    publish(checkpoint, s3_store_uri)
    assert read(open_publication(s3_store_uri).fetch(tmp_path / "fetched")) == CONTENT


def test_what_is_cleaned_away_before_the_manifest_is_put_is_not_published(uri, checkpoint, monkeypatch):
    """Somebody takes the publisher for dead, for which it was cut off from the store for long enough."""

    def upload_and_lose(directory, paths, store):
        files = upload_beside(directory, paths, store)
        store.delete("model-00002.safetensors")
        return files

    with monkeypatch.context() as patch:
        patch.setattr("core.storage.publication.upload_beside", upload_and_lose)
        with pytest.raises(StorageError, match=r"lost a file while it was published.*Run the step again\.$"):
            publish(checkpoint, uri)
    assert find_publication(uri) is None
    assert publish(checkpoint, uri).is_whole()


def test_an_interrupted_publication_in_a_folder_goes_on(checkpoint, tmp_path):
    uri = str(tmp_path / "store")
    publish(checkpoint, uri)
    die_before_the_manifest(uri)
    (tmp_path / "store/config.json").unlink()
    before = {path: (tmp_path / "store" / path).stat().st_ino for path in CONTENT if path != "config.json"}
    publish(checkpoint, uri)
    assert before == {path: (tmp_path / "store" / path).stat().st_ino for path in before}
    assert read(tmp_path / "store") == CONTENT


def test_what_was_damaged_before_the_manifest_was_put_is_not_published(uri, checkpoint, tmp_path):
    publish(checkpoint, uri)
    die_before_the_manifest(uri)
    open_store(uri).write_bytes("config.json", b"damaged")
    assert publish(checkpoint, uri).manifest.folder
    assert read(open_publication(uri).fetch(tmp_path / "fetched")).items() >= CONTENT.items()


def test_a_publication_is_read_once(uri, tmp_path):
    """Of a big file and a small one, the kernel counts the bytes that this process reads."""
    size = 40_000_000
    checkpoint = write(tmp_path / "big", {"model.safetensors": os.urandom(size), "config.json": b"{}"})
    before = read_bytes()
    publish(checkpoint, uri)
    share = (read_bytes() - before) / size
    assert 1 <= share < 1.2
    note(
        "Publishing",
        "the bytes that a publication of 40 MB reads" + backend(uri),
        f"{share:.1f} times its size",
    )


def read_bytes() -> int:
    """Return how many bytes this process has read so far, from files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_an_interrupted_fetch_goes_on_without_the_files_that_verify(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    publish(checkpoint, s3_store_uri)
    broken = "model-00002.safetensors"

    def fail_one_file(request, forward):
        return Reply(status=500) if request.path.endswith(broken) else forward()

    error = pytest.raises(StorageError, match=f"{broken} cannot be read.* 500")
    with behind(s3_server, fail_one_file, monkeypatch, attempts=2), error:
        open_publication(s3_store_uri).fetch(tmp_path / "fetched")
    assert read(tmp_path / "fetched") == {path: data for path, data in CONTENT.items() if path != broken}

    (tmp_path / "fetched/config.json").write_bytes(b"{")  # a file that does not verify is fetched again
    seen: list[tuple[str, str]] = []
    with behind(s3_server, count_requests(seen), monkeypatch):
        open_publication(s3_store_uri).fetch(tmp_path / "fetched")
    note(
        "Publishing",
        "a fetch cut short, and started again (s3)",
        "only the missing and the damaged file moved",
    )
    assert sorted(name for method, name in seen if method == "GET") == [
        "MANIFEST.json",
        "config.json",
        broken,
    ]
    assert read(tmp_path / "fetched") == CONTENT


def test_files_are_uploaded_in_parallel(s3_server, s3_store_uri, checkpoint, monkeypatch):
    two_at_once = threading.Barrier(2, timeout=30)

    def wait_for_another(request, forward):
        if request.method == "PUT" and "model-" in request.path:
            two_at_once.wait()
        return forward()

    with behind(s3_server, wait_for_another, monkeypatch):
        publish(checkpoint, s3_store_uri)
