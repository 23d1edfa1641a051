"""Faults between boto3 and a real S3 server: requests that fail for a while, and for good."""

import dataclasses
import json
import random
import re
from datetime import timedelta

import pytest

from core.errors import StorageError
from core.storage.manifest import OWN, fetch, publish, read_manifest
from core.storage.store import open_store
from tests import faults
from tests.evidence import note
from tests.faults import Striking, goes_down, goes_up, of
from tests.publications import behind, read, write
from tests.servers import Reply

BIG = "model.safetensors"
CONTENT = {
    "config.json": b"{}",
    BIG: random.Random(0).randbytes(9_000_000),  # two parts
    "tokenizer/vocab.txt": b"a\nb\n" * 1000,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoint"), CONTENT)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Between attempts; a server that does not answer is given up soon."""
    monkeypatch.setattr("core.storage.s3_retries._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("core.storage.s3._READ_TIMEOUT_S", 0.5)


def refused(call, match, kind=StorageError):
    """Return the one line that ``call`` fails with."""
    with pytest.raises(kind, match=match) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "test-secret-key" not in message
    return message


def error_of(call):
    """Return the text of the StorageError that ``call`` raises, "" if it raises none."""
    try:
        call()
    except StorageError as error:
        return str(error)
    return ""


def moved(striking):
    """Return the names of files whose bytes have passed a proxy, less those of the storage itself."""
    names = {name for method, name, _ in striking.passed if method in ("GET", "PUT")}
    return names - {*OWN, ""}


def recorded(uri):
    """Return the files of which a publication that was cut short has noted that they are stored."""
    store = open_store(uri)
    return set(json.loads(store.read_bytes("_UPLOADED.json"))) if store.exists("_UPLOADED.json") else set()


def check_published(uri, folder):
    assert read(fetch(uri, folder)) == CONTENT
    assert {key for key in open_store(uri).list() if "/" not in key} <= {"MANIFEST.json", *CONTENT}


@pytest.mark.parametrize("name", faults.UP)
def test_faults_that_pass_on_the_way_up_cost_only_time(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    striking = Striking(faults.UP[name], goes_up, times=2)
    with behind(s3_server, striking, monkeypatch):
        publish(checkpoint, s3_store_uri)
    assert {method for method, *_ in striking.struck} == {"PUT", "POST"}
    assert read_manifest(s3_store_uri).folder == ""
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
        fetch(s3_store_uri, tmp_path / "fetched")
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
        fetch(s3_store_uri, tmp_path / "fetched")
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
        assert read(fetch(s3_store_uri, tmp_path / "fetched")) == many
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
    assert read_manifest(s3_store_uri) is None
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
            assert "answers 404 NoSuchUpload. Check the server, then rerun to go on." in message
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
        message = refused(lambda: fetch(s3_store_uri, target), f"{BIG} cannot be read: ")
    assert re.search("Check the (server|network), then rerun to go on[.]$", message)
    assert {path.name for path in target.rglob("*")} <= {"config.json", "tokenizer", "vocab.txt"}
    assert all(striking.struck.count(asked) <= 3 for asked in striking.struck)
    again = Striking(faults.reset, lambda request: False)
    with behind(s3_server, again, monkeypatch):
        fetch(s3_store_uri, target)
    assert BIG in moved(again)
    assert read(target) == CONTENT
    note(
        "Faults",
        f"{name}: always for one file of a fetch",
        "one line; no half file; the rerun fetched the rest",
    )


def every_action(uri, tmp_path):
    """Return the calls that ask the server for something."""
    source, store = write(tmp_path / "source", {"x": b"x"}) / "x", open_store(uri)
    return [
        lambda: store.write_bytes("key", b"x"),
        lambda: store.write_bytes("key", b"x", if_absent=True),
        lambda: store.exists("key"),
        lambda: list(store.list()),
        lambda: list(store.unfinished()),
        lambda: store.sha256("key"),
        lambda: store.upload(source, "key"),
        lambda: store.download("key", tmp_path / "copy"),
        lambda: store.delete("key"),
        lambda: store.read_bytes("key"),
        lambda: read_manifest(uri),
    ]


def test_a_server_that_takes_requests_and_never_answers_is_given_up(
    s3_server, s3_store_uri, tmp_path, monkeypatch
):
    swallow = faults.Swallow()
    with behind(s3_server, swallow, monkeypatch, attempts=2):
        for action in every_action(s3_store_uri, tmp_path)[::3]:
            refused(action, r"breaks off \(ReadTimeoutError\)")
        swallow.let_go()
    note("Faults", "requests that are swallowed", "given up after a minute each; one line")


EXPIRED = "have expired (ExpiredToken). Get new ones, then rerun to go on."

LASTING = {
    "credentials that have expired": (
        faults.error(400, "ExpiredToken"),
        EXPIRED,
    ),
    "credentials that have expired (403)": (
        faults.error(403, "ExpiredToken"),
        EXPIRED,
    ),
    "no permission": (
        faults.error(403, "AccessDenied"),
        "denies access (AccessDenied). Check AWS_ACCESS_KEY_ID",
    ),
    "a clock that differs": (faults.error(403, "RequestTimeTooSkewed"), "differ too much. Set the clock."),
    "a server without space (507)": (
        faults.error(507, "InsufficientStorage"),
        "has no space left (",
    ),
    "a quota that is used up": (
        faults.error(403, "QuotaExceeded"),
        "has no space left (QuotaExceeded). Free space there, then rerun to go on.",
    ),
    "a page of a proxy (200)": (lambda *_: Reply(status=200, body=b"<html>Log in!</html>"), ". "),
    "a page of a proxy (407)": (lambda *_: Reply(status=407, body=b"<html>Log in!</html>"), "answers 407. "),
    "a gateway's error page": (lambda *_: Reply(status=504, body=b"<html>Gateway</html>"), "answers 504. "),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_is_refused_is_one_line_that_says_what_to_do(
    s3_server, s3_store_uri, tmp_path, monkeypatch, name
):
    fault, expected = LASTING[name]
    striking = Striking(fault)
    with behind(s3_server, striking, monkeypatch, attempts=2):
        for action in every_action(s3_store_uri, tmp_path):
            striking.struck.clear()
            message = error_of(action)
            assert expected in message or ("200" in name and message == "")
            assert message[-1:] in (".", "")
            assert "\n" not in message
            is_retried = "gateway" in name
            assert is_retried == (len(striking.struck) > len(set(striking.struck)))
    note("Faults", f"{name}, whatever is asked", "one line that says what to do")


def test_credentials_that_expire_in_the_middle_stop_a_publication_at_once(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    """After every third of the requests that a publication makes."""
    times, done = 0, False
    while not done:
        uri = f"{s3_store_uri}/{times}"
        status = 403 if times % 2 else 400
        striking = Striking(faults.error(status, "ExpiredToken"), after=times)
        with behind(s3_server, striking, monkeypatch):
            message = error_of(lambda uri=uri: publish(checkpoint, uri))
        assert message == "" or EXPIRED in message
        done = message == ""
        if not done:
            is_published = read_manifest(uri) is not None
            assert is_published <= (("PUT", "MANIFEST.json", "") in striking.passed)
            asked = [what for what in striking.struck if what[1] not in OWN]
            assert len(set(asked)) == len(asked), "it is of no use to try again"
            stored = recorded(uri)
            again = Striking(faults.reset, lambda request: False)
            with behind(s3_server, again, monkeypatch):
                publish(checkpoint, uri)
            assert not moved(again) & {name.rpartition("/")[2] for name in stored}
            check_published(uri, tmp_path / "fetched")
            times += 3
    assert times >= 12
    tried = "credentials that expire after some number of requests of a publication"
    note("Faults", tried, "one line, without retries; the rerun went on", times // 3)


def test_credentials_that_expire_in_the_middle_stop_a_fetch_at_once(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    publish(checkpoint, s3_store_uri)
    times, done = 0, False
    while not done:
        target = tmp_path / f"fetched-{times}"
        striking = Striking(faults.error(403 if times % 2 else 400, "ExpiredToken"), after=times)
        with behind(s3_server, striking, monkeypatch):
            message = error_of(lambda target=target: fetch(s3_store_uri, target))
        assert message == "" or EXPIRED in message
        done = message == ""
        there = read(target)
        assert there.items() <= CONTENT.items()
        if not done:
            again = Striking(faults.reset, lambda request: False)
            with behind(s3_server, again, monkeypatch):
                fetch(s3_store_uri, target)
            assert not moved(again) & {name.rpartition("/")[2] for name in there}
            assert read(target) == CONTENT
            times += 3
    assert times >= 8
    tried = "credentials that expire after some number of requests of a fetch"
    note("Faults", tried, "one line, no half file; the rerun fetched the rest", times // 3)


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_a_clock_that_is_an_hour_off_is_said_to_be(s3_store_uri, checkpoint, tmp_path, monkeypatch, hours):
    from botocore.compat import get_current_datetime

    with monkeypatch.context() as clock:
        clock.setattr(
            "botocore.auth.get_current_datetime", lambda: get_current_datetime() + timedelta(hours=hours)
        )
        for action in every_action(s3_store_uri, tmp_path):
            refused(action, "clocks of this machine and of .* differ too much. Set the clock")
        refused(lambda: publish(checkpoint, s3_store_uri), "Set the clock")
    publish(checkpoint, s3_store_uri)
    check_published(s3_store_uri, tmp_path / "fetched")
    note("Faults", "this machine's clock is an hour off", "one line: set the clock; a rerun published")


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "bucket"])
def test_what_was_mistyped_publishes_and_fetches_nothing(
    s3_store_uri, checkpoint, tmp_path, monkeypatch, variable
):
    uri = s3_store_uri if variable != "bucket" else s3_store_uri.replace("models", "no-such-bucket")
    with monkeypatch.context() as environment:
        environment.setenv(variable, "wrong-and-private")
        for call in (lambda: publish(checkpoint, uri), lambda: fetch(uri, tmp_path / "fetched")):
            message = refused(call, "denies access|there is no bucket no-such-bucket")
            assert "wrong-and-private" not in message
    assert list(open_store(s3_store_uri).list()) == []
    assert not (tmp_path / "fetched").exists()
    note("Faults", f"a wrong {variable}", "one line; nothing was published or fetched")


def test_a_store_that_may_be_read_and_not_written(s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch):
    publish(checkpoint, s3_store_uri)
    striking = Striking(
        faults.error(403, "AccessDenied"), lambda request: request.method not in ("GET", "HEAD")
    )
    with behind(s3_server, striking, monkeypatch):
        fetch(s3_store_uri, tmp_path / "fetched")
        publish(checkpoint, s3_store_uri)  # it is there
        other = f"{s3_store_uri}/other"
        refused(lambda: publish(checkpoint, other), r"cannot be written: .* denies access \(AccessDenied\)")
    assert len(striking.struck) == 1
    publish(checkpoint, other)
    check_published(other, tmp_path / "fetched")
    note("Faults", "a bucket that may be read and not written (403)", "reads went on; writes: one line")


def test_bytes_that_change_on_the_way_are_found_by_their_checksum(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    publish(checkpoint, s3_store_uri)

    def flip(request, forward):
        reply = forward()
        if request.method != "GET" or not reply.body:
            return reply
        return dataclasses.replace(reply, body=bytes([reply.body[0] ^ 1]) + reply.body[1:])

    for name in CONTENT:
        striking = Striking(flip, of("GET", name.rpartition("/")[2]))
        with behind(s3_server, striking, monkeypatch):
            target = tmp_path / name.replace("/", "-")
            refused(lambda target=target: fetch(s3_store_uri, target), f"{name} ")
        assert not (target / name).exists()
        fetch(s3_store_uri, target)
        assert read(target) == CONTENT
    note(
        "Faults", "a bit that flips on the way down", "one line; not used; the rerun fetched it", len(CONTENT)
    )
