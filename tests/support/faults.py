"""Faults for ``tests.support.servers.s3_proxy``, between boto3 and an S3 server, and when they strike."""

import dataclasses
import json
import random
import re
import threading
from urllib.parse import parse_qs, urlsplit

import pytest

from core.errors import StorageError
from core.storage.publication import OWN, open_publication
from core.storage.store import open_store
from tests.support.publications import read
from tests.support.servers import HangUp, Reply

BIG = "model.safetensors"
CONTENT = {
    "config.json": b"{}",
    BIG: random.Random(0).randbytes(9_000_000),  # two parts
    "tokenizer/vocab.txt": b"a\nb\n" * 1000,
}


def error(status, code, message="Told by the test."):
    """Return a fault: the error of an S3 server."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"

    def answer(request, forward):
        return Reply(status=status, headers={"Content-Type": "application/xml"}, body=body.encode())

    return answer


def reset(request, forward):
    """The connection is reset before the server hears of the request."""
    raise HangUp


def reset_in_the_request(request, forward):
    """The connection is reset when some of the request's body has been read."""
    raise HangUp(after=1000)


def reset_in_the_reply(request, forward):
    """The connection is reset when half of the reply has been sent."""
    reply = forward()
    return dataclasses.replace(reply, cut=len(reply.body) // 2, reset=True)


def cut_short(request, forward):
    """The connection is closed when half of the reply has been sent."""
    reply = forward()
    return dataclasses.replace(reply, cut=len(reply.body) // 2)


def trickle(request, forward):
    """The reply comes in a hundred pieces, with pauses."""
    reply = forward()
    return dataclasses.replace(reply, piece_bytes=len(reply.body) // 100 + 1, pause_s=0.01)


def lost_in_a_500(request, forward):
    """The server does what it is asked, and the client is told that it failed."""
    forward()
    return error(500, "InternalError")(request, forward)


def lost_in_a_reset(request, forward):
    """The server does what it is asked, and the client does not hear of it."""
    forward()
    raise HangUp


class Swallow:
    """Requests are taken and never answered, until ``let_go``."""

    def __init__(self):
        self._ended = threading.Event()

    def __call__(self, request, forward):
        self._ended.wait(60)
        raise HangUp

    def let_go(self):
        self._ended.set()


EITHER_WAY = {
    "connections reset before the reply": reset,
    "replies 500 InternalError": error(500, "InternalError"),
    "replies 503 SlowDown": error(503, "SlowDown"),
    "replies 502 without a body": lambda request, forward: Reply(status=502),
}
UP = EITHER_WAY | {
    "connections reset in the middle of a request": reset_in_the_request,
    "replies lost: done, and then 500": lost_in_a_500,
    "replies lost: done, and then a reset": lost_in_a_reset,
}
DOWN = EITHER_WAY | {
    "connections reset in the middle of a reply": reset_in_the_reply,
    "replies cut short": cut_short,
}


def kind(request):
    """Return what a request is for, such as ("PUT", "model.safetensors", "partNumber=2")."""
    parts = urlsplit(request.path)
    query = parse_qs(parts.query, keep_blank_values=True)
    action = [name for name in ("uploads", "uploadId", "list-type", "delete") if name in query]
    if "partNumber" in query:
        action = [f"partNumber={query['partNumber'][0]}"]
    span = next((value for name, value in request.headers.items() if name.lower() == "range"), "")
    return request.method, parts.path.rpartition("/")[2], ",".join([*action, *filter(None, [span])])


def goes_up(request):
    return request.method in ("PUT", "POST")


def goes_down(request):
    return request.method in ("GET", "HEAD")


def of(method, name):
    """Return a condition: requests of a method for an object whose name matches."""
    return lambda request: re.fullmatch(method, request.method) and re.fullmatch(name, kind(request)[1])


class Striking:
    """Lets a fault strike some requests: their ``kind`` is in ``struck``, that of others in ``passed``."""

    def __init__(self, fault, where=lambda request: True, *, times=None, after=0, share=None, seed=0):
        """Let ``fault`` strike requests that satisfy ``where``, once ``after`` requests have passed.

        Of requests of one ``kind`` it strikes the first ``times`` (None: all); of all, a random ``share``.
        """
        self.struck, self.passed = [], []
        self._fault, self._where, self._times, self._after = fault, where, times, after
        self._share, self._random, self._lock = share, random.Random(seed), threading.Lock()

    def __call__(self, request, forward):
        asked = kind(request)
        with self._lock:
            strikes = bool(self._where(request)) and len(self.passed) >= self._after
            strikes &= self._times is None or self.struck.count(asked) < self._times
            strikes &= self._share is None or self._random.random() < self._share
            (self.struck if strikes else self.passed).append(asked)
        return self._fault(request, forward) if strikes else forward()


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
    assert read(open_publication(uri).fetch(folder)) == CONTENT
    assert {key for key in open_store(uri).list() if "/" not in key} <= {"MANIFEST.json", *CONTENT}
