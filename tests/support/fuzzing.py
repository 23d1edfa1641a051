"""Damaged and hostile files by hypothesis; reading one succeeds, or raises our error of one line."""

import contextlib
import copy
import json
import os
import re
import resource
import signal
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import AdaptPrunerError
from tests.support.evidence import note

EXAMPLES = int(os.environ.get("ADAPT_PRUNER_EXAMPLES", "60"))
"""Tries of each test; the same ones every time, unless there are more than usual."""
_PATIENCE_S = 60
_MEMORY = 2**29


def fuzzed(share=1.0):
    """Settings of a fuzz test; ``share`` of the usual number of examples for those that are slow."""
    return settings(
        max_examples=examples(share),
        deadline=None,
        derandomize="ADAPT_PRUNER_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def examples(share=1.0):
    return max(5, round(EXAMPLES * share))


class Hung(BaseException):
    pass


@contextlib.contextmanager
def bounded():
    """Interrupt what hangs, and refuse half a gigabyte of memory on top of what there is."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def stop(*_):
        raise Hung

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_PATIENCE_S)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def outcome(call, *, may_run_out=False):
    """Return "" if ``call`` succeeds, else the text of our error; anything else it raises fails the test.

    With ``may_run_out`` the error may be that there is not enough memory.
    """
    try:
        with bounded():
            call()
    except AdaptPrunerError as error:
        text = str(error)
        assert text.isprintable(), "one line that steers no terminal"
        assert text.endswith(".")
        assert len(text) < 2000
        assert may_run_out or not re.search("allocate|MemoryError", text), "it was tried to take much memory"
        return text
    return ""


def fuzz(tried, attempt, *given_values, share=1.0):
    """Call ``attempt`` with examples of strategies; return what it gave: texts of our errors, or ""."""
    seen = []

    @fuzzed(share)
    @given(st.tuples(*given_values))
    def try_one(values):
        seen.append(attempt(*values))

    try_one()
    tell(tried, seen, share)
    return seen


def fuzz_file(tried, path, document, *reads, share=1.0):
    """Read a JSON file in many ways, changed and damaged."""

    def attempt(how):
        path.parent.mkdir(exist_ok=True)  # a read may have removed it with the file
        path.write_bytes(variant(document, how))
        return "".join([outcome(read) for read in reads])

    fuzz(f"{tried}, changed and damaged", attempt, FILES, share=share)


def tell(tried, seen, share=1.0):
    """Note what a fuzz test has seen: the outcomes of its examples, some of which were refusals."""
    assert any(seen), "something was refused"
    assert len(seen) >= examples(share)
    note("Security", tried, "read, or refused with one line", examples(share))


# Sizes that overflow, or ask for all the memory there is.
NUMBERS = st.sampled_from([0, 1, -1, 3, 7, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**30])
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        NUMBERS,
        st.floats(),
        st.sampled_from(
            ["", "a", "../x", "\x1b[2J", "nan", "\ud800", "F4", "I64", "model.safetensors", "x" * 300]
        ),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=4,
)
_REMOVED = object()
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**20), st.one_of(VALUES, st.just(_REMOVED))), min_size=1, max_size=3
)


def places(document, at=()):
    """Return the path of everything in a JSON document."""
    items = enumerate(document) if isinstance(document, list) else ()
    items = document.items() if isinstance(document, dict) else items
    return [at] + [path for key, value in items for path in places(value, (*at, key))]


def changed(document, changes):
    """Return a copy in which the entries that ``changes`` point to are replaced or gone."""
    document = copy.deepcopy(document)
    for number, value in changes:
        paths = places(document)
        path = paths[number % len(paths)]
        if not path:
            document = None if value is _REMOVED else value
            continue
        place = document
        for key in path[:-1]:
            place = place[key]
        if value is _REMOVED:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    return document


def as_bytes(document):
    return json.dumps(document).encode(errors="surrogatepass")


BYTES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "number"]),
        st.integers(0, 2**30),
        st.one_of(
            st.binary(min_size=1, max_size=9), NUMBERS.map(lambda n: (n % 2**64).to_bytes(8, "little"))
        ),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, changes, within=None):
    """Return bytes with changes made to them, in the first ``within`` of them."""
    content = bytearray(content)
    for kind, position, data in changes:
        place = position % max(1, min(within or len(content), len(content)))
        if kind == "flip" and content:
            content[place] ^= data[0] or 1
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data
        elif kind == "remove":
            del content[place : place + len(data)]
        else:
            content[place : place + len(data)] = data
    return bytes(content)


DEEP = [
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"weight_map":' + b"[" * 200_000,
    b"",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"1" * 5000,
]
"""What breaks parsers."""
FILES = st.one_of(
    st.tuples(st.just("json"), CHANGES),
    st.tuples(st.just("bytes"), BYTES),
    st.tuples(st.just("deep"), st.sampled_from(DEEP)),
)


def variant(document, how):
    """Return the bytes of a JSON file that has been changed as ``FILES`` says."""
    kind, change = how
    if kind == "json":
        return as_bytes(changed(document, change))
    return damaged(as_bytes(document), change) if kind == "bytes" else change
