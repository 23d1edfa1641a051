import concurrent.futures
import hashlib
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core.errors import StorageError
from core.storage.interface import join_uri
from core.storage.publication import publish
from core.storage.store import open_store, replacing
from tests.support.servers import Reply, s3_proxy


def one_line(error: pytest.ExceptionInfo[StorageError]) -> str:
    """The message, after checking what all of them promise."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "test-secret-key" not in message
    assert "test-access-key" not in message
    return message


def test_what_is_written_is_read_back_and_replaced_by_the_next_write(store):
    assert not store.exists("a/b.json")
    assert store.write_bytes("a/b.json", b"one")
    assert store.write_bytes("a/b.json", b"two")
    assert store.exists("a/b.json")
    assert store.read_bytes("a/b.json") == b"two"
    assert store.write_bytes("empty", b"")
    assert store.read_bytes("empty") == b""


def test_reading_a_missing_key_is_a_file_not_found_error(store, tmp_path):
    store.write_bytes("there", b"1")
    for missing in ("missing", "there/below", "ther"):
        assert not store.exists(missing)
        with pytest.raises(FileNotFoundError, match=missing):
            store.read_bytes(missing)
        with pytest.raises(FileNotFoundError, match=missing):
            store.download(missing, tmp_path / "there")
        assert store.sha256(missing) is None
        store.delete(missing)
    assert list(tmp_path.glob(".*")) == []


def test_listing_finds_every_key_by_prefix(store):
    keys = ["a.json", "a/1.json", "a/2/3.json", "ab/1.json", "b"]
    for key in keys:
        store.write_bytes(key, b"x")
    assert sorted(store.list()) == sorted(keys)
    assert sorted(store.list("a/")) == ["a/1.json", "a/2/3.json"]
    assert sorted(store.list("a")) == sorted(keys[:-1])
    assert list(store.list("c/")) == []


def test_listing_goes_beyond_one_page(s3_store_uri):
    store = open_store(s3_store_uri)
    keys = [f"many/{number:04}" for number in range(1005)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write_bytes(key, b"x"), keys))
    assert sorted(store.list("many/")) == keys


def test_deleting_removes_the_key_and_leaves_no_empty_folder(store):
    store.write_bytes("a/b/c", b"x")
    store.write_bytes("a/d", b"x")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert list(store.list()) == ["a/d"]
    if root := store.local_path(""):
        assert not (root / "a/b").exists()


def test_a_file_of_many_parts_comes_back_equal(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(random.Random(0).randbytes(21_000_001))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert store.upload(source, "big/file.safetensors") == sha256
    assert store.download("big/file.safetensors", tmp_path / "copy") == sha256
    assert store.sha256("big/file.safetensors") == sha256
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_writing_to_an_uploaded_file_does_not_change_the_stored_one(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"first")
    store.upload(source, "file")
    with source.open("r+b") as file:
        file.write(b"SECND")
    assert store.read_bytes("file") == b"first"


def test_of_many_writers_if_absent_exactly_one_wins(store):
    start = threading.Barrier(8)

    def write(writer: int) -> bool:
        start.wait()
        return store.write_bytes("lock", f"writer {writer}".encode(), if_absent=True)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert store.read_bytes("lock") == f"writer {won.index(True)}".encode()
    assert not store.write_bytes("lock", b"late", if_absent=True)
    assert list(store.list()) == ["lock"]


def test_of_many_uploads_if_absent_exactly_one_wins(store, tmp_path):
    start = threading.Barrier(8)

    def upload(writer: int) -> str | None:
        path = tmp_path / f"writer-{writer}"
        path.write_bytes(bytes([writer]) * 3_000_000)
        start.wait()
        return store.upload(path, "file", if_absent=True)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = [sha256 for sha256 in pool.map(upload, range(8)) if sha256]
    assert won == [store.sha256("file")]
    assert store.upload(tmp_path / "writer-0", "file", if_absent=True) is None
    assert store.upload(tmp_path / "writer-0", "file") == store.sha256("file")


def test_readers_never_see_half_a_file(store, tmp_path):
    contents = [bytes([letter]) * 300_000 for letter in b"ab"]
    store.write_bytes("file", contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for content in contents:
                store.write_bytes("file", content)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite)
        for _ in range(30):
            assert store.read_bytes("file") in contents
        stop.set()
        writer.result()


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "", "a\\b", "a\nb"])
def test_a_key_cannot_leave_the_store(store, tmp_path, key):
    for action in (store.read_bytes, store.delete, store.exists, lambda k: store.write_bytes(k, b"x")):
        with pytest.raises(StorageError, match="leaves its folder"):
            action(key)


def test_an_uri_names_a_folder_or_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"
    assert open_store("relative/folder").uri == f"{tmp_path}/relative/folder"
    assert (
        join_uri("s3://bucket/prefix/", "runs", "key/", "", "run.json")
        == "s3://bucket/prefix/runs/key/run.json"
    )
    for uri in ("", "gs://bucket/x", "s3://", "file://host/x", "s3://user:pass@bucket/x"):
        with pytest.raises(StorageError, match="is not a store") as error:
            open_store(uri)
        assert "pass" not in str(error.value)


def test_boto3_is_imported_only_for_s3(tmp_path):
    code = "import sys, core.storage.publication; from core.storage.store import open_store; "
    code += "open_store(sys.argv[1]).write_bytes('a', b'x'); sys.exit('boto3' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file" / "store", Path("/proc/store")):
        with pytest.raises(
            StorageError, match=f"{folder}.*cannot be read or written.*use another folder"
        ) as error:
            open_store(folder).write_bytes("runs/a", b"x")
        one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied"):
        open_store(tmp_path).write_bytes("a", b"x")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(store, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(300_000))
    store.upload(source, "file")
    target.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="Free space") as error, replacing(target / "copy") as part:
            store.download("file", part)
        with pytest.raises(StorageError, match="Free space"):
            open_store(target).write_bytes("copy", bytes(300_000))
        with pytest.raises(StorageError, match="Free space"):
            open_store(target).upload(source, "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "copy" in one_line(error)
    assert list(target.iterdir()) == []


def test_folders_without_hard_links_still_write_if_absent(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path)
    assert store.write_bytes("lock", b"one", if_absent=True)
    assert not store.write_bytes("lock", b"two", if_absent=True)
    assert store.read_bytes("lock") == b"one"


def every_action_fails(uri: str, tmp_path: Path, match: str) -> str:
    """Try each method of the store; return the message of the last."""
    (tmp_path / "source").write_bytes(b"x")
    store = open_store(uri)
    actions = (
        lambda: store.write_bytes("key", b"x"),
        lambda: store.write_bytes("key", b"x", if_absent=True),
        lambda: store.exists("key"),
        lambda: list(store.list()),
        lambda: store.sha256("key"),
        lambda: store.upload(tmp_path / "source", "key"),
        lambda: store.download("key", tmp_path / "copy"),
        lambda: store.delete("key"),
        lambda: store.read_bytes("key"),
    )
    for action in actions:
        with pytest.raises(StorageError, match=match) as error:
            action()
        assert uri in one_line(error)
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "copy"}
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "code"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_wrong_credentials_are_one_clear_error(s3_store_uri, tmp_path, monkeypatch, name, code):
    monkeypatch.setenv(name, "wrong-and-private")
    message = every_action_fails(s3_store_uri, tmp_path, "denies access .* Check AWS_ACCESS_KEY_ID")
    assert "wrong-and-private" not in message
    with pytest.raises(StorageError, match=code):
        open_store(s3_store_uri).write_bytes("key", b"x")


def test_missing_credentials_are_one_clear_error(s3_store_uri, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="cannot be opened: Partial credentials found"):
        open_store(s3_store_uri)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    every_action_fails(s3_store_uri, tmp_path, "no credentials .* Set AWS_ACCESS_KEY_ID")


def test_a_missing_bucket_is_one_clear_error(s3_store_uri, tmp_path):
    every_action_fails("s3://no-such-bucket/runs", tmp_path, "no bucket no-such-bucket at http.* Create it")
    every_action_fails("s3://no_bucket!/runs", tmp_path, "no_bucket! is not a valid bucket name")


def test_an_unreachable_endpoint_is_one_clear_error(s3_store_uri, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:hidden@127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        message = every_action_fails(s3_store_uri, tmp_path, "cannot be reached .* Check AWS_ENDPOINT_URL_S3")
        assert "hidden" not in message
        monkeypatch.delenv("AWS_MAX_ATTEMPTS")
        start = time.monotonic()
        with pytest.raises(StorageError, match="cannot be reached"):
            open_store(s3_store_uri).read_bytes("key")
        assert time.monotonic() - start < 30


def test_an_invalid_environment_is_one_clear_error(s3_store_uri, monkeypatch):
    for name, value in (
        ("AWS_ENDPOINT_URL_S3", "no scheme"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_MAX_ATTEMPTS", "x"),
    ):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            with pytest.raises(StorageError, match="cannot be opened") as error:
                open_store(s3_store_uri)
            one_line(error)


@pytest.mark.parametrize("ignored", [True, False], ids=["ignored", "refused"])
def test_a_server_without_conditional_writes_is_refused(
    s3_server, s3_store_uri, tmp_path, monkeypatch, ignored
):
    direct, key_of = open_store(s3_store_uri), f"{s3_store_uri.removeprefix('s3://')}/"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"data")

    def without_conditions(request, forward):
        if "If-None-Match" in request.headers and not ignored:
            return Reply(status=501, body=b"<Error><Code>NotImplemented</Code></Error>")
        if "If-None-Match" in request.headers:
            direct.delete(request.path.partition(key_of)[2])  # the header is signed: it cannot be taken away
        return forward()

    with s3_proxy(s3_server, without_conditions) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        needed = r"does not support conditional writes \(If-None-Match: \*\).* Use one that does"
        for call in (
            lambda: open_store(s3_store_uri).write_bytes("lock", b"one", if_absent=True),
            lambda: publish(tmp_path / "source", f"{s3_store_uri}/published"),
        ):
            with pytest.raises(StorageError, match=needed) as error:
                call()
            one_line(error)
    assert not list(direct.list())


@pytest.mark.parametrize("size", [4, 1_000_000, 9_000_000])
def test_a_write_whose_reply_was_lost_still_counts_as_won(
    s3_server, s3_store_uri, tmp_path, monkeypatch, size
):
    lost, content = [], random.Random(1).randbytes(size)
    (tmp_path / "file").write_bytes(content)

    def lose_the_first_reply(request, forward):
        reply = forward()
        if "If-None-Match" in request.headers and not lost:
            lost.append(request.path)
            return Reply(status=503)
        return reply

    with s3_proxy(s3_server, lose_the_first_reply) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = open_store(s3_store_uri)
        if size == 4:
            assert store.write_bytes("file", content, if_absent=True)
        else:
            assert store.upload(tmp_path / "file", "file", if_absent=True) == store.sha256("file")
        (tmp_path / "file").write_bytes(b"another's")
        assert store.upload(tmp_path / "file", "file", if_absent=True) is None
    assert len(lost) == 1
    assert store.read_bytes("file") == content


def test_a_server_that_fails_now_and_then_is_retried(s3_server, s3_store_uri, tmp_path, monkeypatch):
    requests = []

    def fail_every_third(request, forward):
        requests.append(request.path)
        return Reply(status=503) if len(requests) % 3 == 0 else forward()

    (tmp_path / "source").write_bytes(random.Random(1).randbytes(9_000_000))
    with s3_proxy(s3_server, fail_every_third) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = open_store(s3_store_uri)
        store.upload(tmp_path / "source", "file")
        store.download("file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    assert len(requests) > 6
