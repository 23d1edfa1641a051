"""What an S3 server refuses, from the start or in the middle of a transfer, and replies that are not S3's."""

import dataclasses
from datetime import timedelta

import pytest

from core.storage.publication import OWN, find_publication, open_publication, publish
from core.storage.store import open_store
from tests.support import faults
from tests.support.evidence import note
from tests.support.faults import (
    CONTENT,
    Striking,
    check_published,
    error_of,
    moved,
    of,
    recorded,
    refused,
)
from tests.support.publications import behind, read, write
from tests.support.servers import Reply

pytestmark = pytest.mark.usefixtures("short_pauses")


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
        lambda: open_publication(uri),
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


EXPIRED = "have expired (ExpiredToken). Get new ones, then rerun to resume."

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
        "has no space left (QuotaExceeded). Free space there, then rerun to resume.",
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
    """After every fifth of the requests that a publication makes."""
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
            is_published = find_publication(uri) is not None
            assert is_published <= (("PUT", "MANIFEST.json", "") in striking.passed)
            asked = [what for what in striking.struck if what[1] not in OWN]
            assert len(set(asked)) == len(asked), "it is of no use to try again"
            stored = recorded(uri)
            again = Striking(faults.reset, lambda request: False)
            with behind(s3_server, again, monkeypatch):
                publish(checkpoint, uri)
            assert not moved(again) & {name.rpartition("/")[2] for name in stored}
            check_published(uri, tmp_path / "fetched")
            times += 5
    assert times >= 12
    tried = "credentials that expire after some number of requests of a publication"
    note("Faults", tried, "one line, without retries; the rerun went on", times // 5)


def test_credentials_that_expire_in_the_middle_stop_a_fetch_at_once(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    publish(checkpoint, s3_store_uri)
    times, done = 0, False
    while not done:
        target = tmp_path / f"fetched-{times}"
        striking = Striking(faults.error(403 if times % 2 else 400, "ExpiredToken"), after=times)
        with behind(s3_server, striking, monkeypatch):
            message = error_of(lambda target=target: open_publication(s3_store_uri).fetch(target))
        assert message == "" or EXPIRED in message
        done = message == ""
        there = read(target)
        assert there.items() <= CONTENT.items()
        if not done:
            again = Striking(faults.reset, lambda request: False)
            with behind(s3_server, again, monkeypatch):
                open_publication(s3_store_uri).fetch(target)
            assert not moved(again) & {name.rpartition("/")[2] for name in there}
            assert read(target) == CONTENT
            times += 5
    assert times >= 8
    tried = "credentials that expire after some number of requests of a fetch"
    note("Faults", tried, "one line, no half file; the rerun fetched the rest", times // 5)


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
        for call in (
            lambda: publish(checkpoint, uri),
            lambda: open_publication(uri).fetch(tmp_path / "fetched"),
        ):
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
        open_publication(s3_store_uri).fetch(tmp_path / "fetched")
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
            refused(lambda target=target: open_publication(s3_store_uri).fetch(target), f"{name} ")
        assert not (target / name).exists()
        open_publication(s3_store_uri).fetch(target)
        assert read(target) == CONTENT
    note(
        "Faults", "a bit that flips on the way down", "one line; not used; the rerun fetched it", len(CONTENT)
    )
