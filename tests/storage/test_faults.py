"""Faults between boto3 and a real S3 server: requests that fail for a while, and for good."""

import re

import pytest

from core.storage.publication import OWN, find_publication, open_publication, publish
from core.storage.store import open_store
from tests.support import faults
from tests.support.evidence import note
from tests.support.faults import (
    BIG,
    CONTENT,
    Striking,
    check_published,
    goes_down,
    goes_up,
    moved,
    of,
    refused,
)
from tests.support.publications import behind, read, write

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.mark.parametrize("name", faults.UP)
def test_faults_that_pass_on_the_way_up_cost_only_time(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    striking = Striking(faults.UP[name], goes_up, times=2)
    with behind(s3_server, striking, monkeypatch):
        publish(checkpoint, s3_store_uri)
    assert {method for method, *_ in striking.struck} == {"PUT", "POST"}
    assert open_publication(s3_store_uri).manifest.folder == ""
    check_published(s3_store_uri, tmp_path / "fetched")
    begun = [action for *_, action in striking.struck if action == "uploads"]
    # An upload that was begun and whose name did not arrive: what is cleaned.
    assert len(list(open_store(s3_store_uri).unfinished())) == (len(begun) if "lost" in name else 0)
    note("Faults", f"{name}: twice for each request of a publication", "published; the bytes are right")


@pytest.mark.parametrize("name", faults.DOWN)
def test_faults_that_pass_on_the_way_down_cost_only_time(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    publish(checkpoint, s3_store_uri)
    striking = Striking(faults.DOWN[name], goes_down, times=2)
    with behind(s3_server, striking, monkeypatch):
        open_publication(s3_store_uri).fetch(tmp_path / "fetched")
    assert {name for method, name, _ in striking.struck if method == "GET"} >= {BIG, "vocab.txt", *OWN[:1]}
    assert read(tmp_path / "fetched") == CONTENT
    note("Faults", f"{name}: twice for each request of a fetch", "fetched; the bytes are right")


@pytest.mark.parametrize("name", faults.UP | faults.DOWN)
def test_small_reads_writes_and_lists_outlast_faults_that_pass(
    s3_server, s3_store_uri, monkeypatch, tmp_path, name
):
    fault = (faults.UP | faults.DOWN)[name]
    striking = Striking(fault, goes_down if fault in faults.DOWN.values() else goes_up, times=2)
    with behind(s3_server, striking, monkeypatch):
        store = open_store(s3_store_uri)
        assert store.write_bytes("a/run.json", b"{}")
        assert store.write_bytes("a/lease.json", b"mine", if_absent=True)
        assert not store.write_bytes("a/lease.json", b"other", if_absent=True)
        assert store.exists("a/run.json")
        assert not store.exists("a/none")
        assert list(store.list("a/")) == ["a/lease.json", "a/run.json"]
        assert store.read_bytes("a/lease.json") == b"mine"
        assert store.sha256("a/none") is None
        store.delete("a/run.json")
        assert list(store.list()) == ["a/lease.json"]
        with pytest.raises(FileNotFoundError):
            store.read_bytes("a/run.json")
    assert striking.struck
    note("Faults", f"{name}: twice for each small read, write and list", "each did what it does without")


def test_a_reply_that_trickles_is_waited_for(s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch):
    publish(checkpoint, s3_store_uri)
    striking = Striking(faults.trickle, goes_down)
    with behind(s3_server, striking, monkeypatch, attempts=1):
        open_publication(s3_store_uri).fetch(tmp_path / "fetched")
    assert read(tmp_path / "fetched") == CONTENT
    note("Faults", "replies that trickle, for longer than a request may be silent", "fetched at that pace")


@pytest.mark.parametrize("fault", [faults.reset, faults.error(503, "SlowDown")], ids=["resets", "503"])
def test_an_outage_is_outlasted_by_many_transfers_at_once(
    s3_server, s3_store_uri, tmp_path, monkeypatch, fault
):
    many = {f"shard-{number:02}": bytes([number]) * 100_000 for number in range(40)}
    striking = Striking(fault, times=6)
    with behind(s3_server, striking, monkeypatch):
        publish(write(tmp_path / "many", many), s3_store_uri)
        assert read(open_publication(s3_store_uri).fetch(tmp_path / "fetched")) == many
    assert len(striking.struck) > 6 * 2 * len(many)
    note("Faults", "an outage: six failures for each request of 40 transfers at once", "went on; right bytes")


@pytest.mark.parametrize("name", faults.UP)
def test_faults_that_last_stop_a_publication_which_a_rerun_completes(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    striking = Striking(faults.UP[name], of("PUT|POST", BIG))
    with behind(s3_server, striking, monkeypatch, attempts=3):
        message = refused(lambda: publish(checkpoint, s3_store_uri), f"{BIG} cannot be written: ")
    assert re.search("Check .*[.]$", message)
    assert find_publication(s3_store_uri) is None
    assert set(striking.struck) == {("POST", BIG, "uploads")}
    assert len(striking.struck) == 3
    again = Striking(faults.reset, lambda request: False)
    with behind(s3_server, again, monkeypatch):
        publish(checkpoint, s3_store_uri)
    assert moved(again) == {BIG}
    check_published(s3_store_uri, tmp_path / "fetched")
    happened = "one line; nothing published; the rerun moved what was missing and no more"
    note("Faults", f"{name}: always for one file of a publication", happened)


@pytest.mark.parametrize("name", faults.UP)
def test_a_part_that_never_arrives_leaves_no_upload_behind(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    striking = Striking(faults.UP[name], lambda request: "partNumber=2" in request.path)
    with behind(s3_server, striking, monkeypatch, attempts=3):
        refused(lambda: publish(checkpoint, s3_store_uri), f"{BIG} cannot be written: ")
    assert striking.struck == [("PUT", BIG, "partNumber=2")] * 3
    assert not open_store(s3_store_uri).exists(BIG)
    assert list(open_store(s3_store_uri).unfinished()) == []
    publish(checkpoint, s3_store_uri)
    check_published(s3_store_uri, tmp_path / "fetched")
    note(
        "Faults",
        f"{name}: always for one part of a file",
        "one line; the upload was aborted; a rerun went on",
    )


@pytest.mark.parametrize("is_lost", [False, True], ids=["refused", "lost"])
def test_an_upload_whose_end_the_server_does_not_know_any_more(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, is_lost
):
    """Some servers forget an upload once it is completed: a retry of a lost reply meets 404."""

    def complete(request, forward):
        if request.method == "POST" and "uploadId" in request.path:
            if is_lost:
                forward()
            return faults.error(404, "NoSuchUpload")(request, forward)
        return forward()

    with behind(s3_server, complete, monkeypatch, attempts=2):
        if is_lost:
            publish(checkpoint, s3_store_uri)
        else:
            message = refused(lambda: publish(checkpoint, s3_store_uri), f"{BIG} cannot be written: ")
            assert "answers 404 NoSuchUpload. Check the server, then rerun to resume." in message
    publish(checkpoint, s3_store_uri)
    check_published(s3_store_uri, tmp_path / "fetched")
    tried = f"404 NoSuchUpload for the last request of an upload{', which was done' if is_lost else ''}"
    note("Faults", tried, "published; the bytes are right" if is_lost else "one line; a rerun went on")


@pytest.mark.parametrize("name", faults.DOWN)
def test_faults_that_last_stop_a_fetch_which_a_rerun_completes(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    publish(checkpoint, s3_store_uri)
    striking = Striking(faults.DOWN[name], of("GET", BIG))
    target = tmp_path / "fetched"
    with behind(s3_server, striking, monkeypatch, attempts=3):
        message = refused(lambda: open_publication(s3_store_uri).fetch(target), f"{BIG} cannot be read: ")
    assert re.search("Check the (server|network), then rerun to resume[.]$", message)
    assert {path.name for path in target.rglob("*")} <= {"config.json", "tokenizer", "vocab.txt"}
    assert all(striking.struck.count(asked) <= 3 for asked in striking.struck)
    again = Striking(faults.reset, lambda request: False)
    with behind(s3_server, again, monkeypatch):
        open_publication(s3_store_uri).fetch(target)
    assert BIG in moved(again)
    assert read(target) == CONTENT
    note(
        "Faults",
        f"{name}: always for one file of a fetch",
        "one line; no half file; the rerun fetched the rest",
    )
