import concurrent.futures
import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import IntegrityError, StorageError
from core.storage.manifest import OWN, Manifest, delete_publication, fetch, publish, read_manifest
from core.storage.store import join_uri, open_store
from tests.evidence import note
from tests.servers import Reply, Request, s3_proxy

CONTENT = {
    "config.json": b"{}",
    "model-00001.safetensors": b"weights of layer 0",
    "model-00002.safetensors": b"weights of layer 1" * 1000,
    "tokenizer/vocab.txt": "a\nä\n".encode(),
    "empty.txt": b"",
}
# printf 'weights of layer 0' | sha256sum
LAYER_0_SHA256 = "3578502597837c0d15e37970395cadc5135ccd38a8bc1e63590e942ce0e5c7f1"
RIVAL = CONTENT | {"model-00001.safetensors": b"WEIGHTS OF LAYER 0", "model-00002.safetensors": b"others"}


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is published yet: in a folder, and on a real S3 server."""
    base = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_store_uri")
    return join_uri(base, "runs/key/phases/01/pruned")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", CONTENT)


def write(directory: Path, content: dict[str, bytes]) -> Path:
    for path, data in content.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def read(directory: Path) -> dict[str, bytes]:
    """All files, less the two that the storage itself keeps beside them."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    content = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return {path: data for path, data in content.items() if path not in OWN}


@contextlib.contextmanager
def behind(s3_server, spoil, monkeypatch, attempts=8):
    """Let all that the block asks of the S3 server pass by ``spoil``."""
    with s3_proxy(s3_server, spoil) as proxy, monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        environment.setenv("AWS_MAX_ATTEMPTS", str(attempts))
        yield


def die_before_the_manifest(uri: str) -> None:
    """Bring ``uri`` to the state that a publisher leaves who dies at the last moment."""
    open_store(uri).delete("MANIFEST.json")


def backend(uri: str) -> str:
    return " (s3)" if uri.startswith("s3:") else " (folder)"


def edit_manifest(uri: str, edit: Callable[[dict], object]) -> None:
    store = open_store(uri)
    data = json.loads(store.read_bytes("MANIFEST.json"))
    edit(data)
    store.write_bytes("MANIFEST.json", json.dumps(data).encode())


def test_what_is_published_is_fetched(uri, checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    manifest = publish(checkpoint, uri, metadata={"params": 108_000_000, "phases": [1, 2]})
    assert read_manifest(uri) == manifest
    assert manifest.metadata == {"params": 108_000_000, "phases": [1, 2]}
    assert [entry.path for entry in manifest.files] == sorted(CONTENT)
    assert manifest.files[2].sha256 == LAYER_0_SHA256
    assert manifest.total_bytes == sum(map(len, CONTENT.values()))
    assert read(fetch(uri, tmp_path / "fetched")) == CONTENT
    assert f"published {uri}: 5 files" in caplog.text


def test_a_folder_is_fetched_where_it_is(checkpoint, tmp_path):
    uri = f"file://{tmp_path}/store/pruned"
    publish(checkpoint, uri)
    assert fetch(uri, tmp_path / "unused") == tmp_path / "store/pruned"
    assert not (tmp_path / "unused").exists()


def test_equal_content_has_an_equal_digest(uri, checkpoint):
    manifest = publish(checkpoint, uri, metadata={"seconds": 1})
    again = publish(checkpoint, join_uri(uri, "again"), metadata={"seconds": 2})
    assert manifest.digest == again.digest
    (checkpoint / "config.json").write_bytes(b"{ }")
    assert publish(checkpoint, join_uri(uri, "other")).digest != manifest.digest


def test_only_the_wanted_files_are_fetched(s3_store_uri, checkpoint, tmp_path):
    publish(checkpoint, s3_store_uri)
    wanted = ["config.json", "tokenizer/vocab.txt"]
    directory = fetch(s3_store_uri, tmp_path / "fetched", only=wanted)
    assert read(directory) == {path: CONTENT[path] for path in wanted}
    with pytest.raises(StorageError, match=r"holds no file model\.bin"):
        fetch(s3_store_uri, tmp_path / "fetched", only=["config.json", "model.bin"])


def test_a_directory_without_a_manifest_is_not_readable(uri, checkpoint, tmp_path):
    publish(checkpoint, uri)
    die_before_the_manifest(uri)
    assert read_manifest(uri) is None
    with pytest.raises(StorageError, match=f"{uri} is not published: no MANIFEST.json") as error:
        fetch(uri, tmp_path / "fetched")
    assert not isinstance(error.value, IntegrityError)


def test_the_first_publication_stays(uri, checkpoint, tmp_path):
    first = publish(checkpoint, uri)
    assert publish(write(tmp_path / "rival", RIVAL), uri) == first
    assert read(fetch(uri, tmp_path / "fetched")) == CONTENT


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
            if read_manifest(uri) is not None:
                folder = fetch(uri, tmp_path / "watched")
                assert {name: (folder / name).read_bytes() for name in "abc"} in contents

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        watcher = pool.submit(watch)
        try:
            manifests = list(pool.map(run, range(8)))
        finally:
            done.set()
        watcher.result()
    winner = manifests[0]
    assert all(manifest == winner for manifest in manifests)
    note(
        "Publishing",
        "eight publishers of four contents at once"
        + (", after one that died" if a_dead_publisher_was_first else "")
        + backend(uri),
        "one won, all returned its manifest, and every reader saw one whole content",
    )
    left = set(open_store(uri).list()) - {"MANIFEST.json", *(winner.key(entry) for entry in winner.files)}
    assert left <= {"a", "b", "c", "d", "_UPLOADED.json"}, "losers remove the folders that only they know"
    assert read(fetch(uri, tmp_path / "fetched")) in [dict(content) for content in contents]


def test_a_rival_that_uploads_before_the_manifest_is_put_corrupts_nothing(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    both_have_uploaded = threading.Barrier(2, timeout=30)

    def hold_manifests(request, forward):
        if request.method == "PUT" and request.path.endswith("MANIFEST.json"):
            both_have_uploaded.wait()
        return forward()

    rival = write(tmp_path / "rival", RIVAL)
    with behind(s3_server, hold_manifests, monkeypatch), concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda directory: publish(directory, s3_store_uri), [checkpoint, rival])
    assert one == two
    assert read(fetch(s3_store_uri, tmp_path / "fetched")) in (CONTENT, RIVAL)
    note(
        "Publishing", "two publishers have stored all files when the first puts its manifest (s3)", "one won"
    )


def test_a_rerun_after_a_crash_publishes_what_it_has(uri, checkpoint, tmp_path):
    publish(write(tmp_path / "rival", RIVAL), uri)
    die_before_the_manifest(uri)
    assert publish(checkpoint, uri) == read_manifest(uri)
    assert read(fetch(uri, tmp_path / "fetched")) == CONTENT


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
    assert read_manifest(uri) is None


def test_an_interrupted_publication_goes_on(s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch):
    interrupt(s3_server, s3_store_uri, checkpoint, monkeypatch, "tokenizer/vocab.txt")
    seen: list[tuple[str, str]] = []
    with behind(s3_server, count_requests(seen), monkeypatch):
        manifest = publish(checkpoint, s3_store_uri)
    moved = [name for method, name in seen if method in ("PUT", "GET") and name not in OWN]
    assert moved == ["vocab.txt"]
    note(
        "Publishing",
        "a publication cut short, and started again (s3)",
        "only the file that was missing moved",
    )
    assert manifest.folder == ""
    assert sorted(open_store(s3_store_uri).list()) == sorted(["MANIFEST.json", *CONTENT])
    assert read(fetch(s3_store_uri, tmp_path / "fetched")) == CONTENT


@pytest.mark.parametrize("damage", ["{", "[]", '{"config.json": 7}', '{"config.json": "00"}'])
def test_a_damaged_record_of_an_interrupted_publication_does_no_harm(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, damage
):
    interrupt(s3_server, s3_store_uri, checkpoint, monkeypatch, "tokenizer/vocab.txt")
    open_store(s3_store_uri).write_bytes("_UPLOADED.json", damage.encode())
    publish(checkpoint, s3_store_uri)
    assert read(fetch(s3_store_uri, tmp_path / "fetched")) == CONTENT


def test_what_an_interrupted_publication_has_lost_since_is_uploaded_again(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    interrupt(s3_server, s3_store_uri, checkpoint, monkeypatch, "tokenizer/vocab.txt")
    open_store(s3_store_uri).delete("model-00002.safetensors")
    publish(checkpoint, s3_store_uri)
    assert read(fetch(s3_store_uri, tmp_path / "fetched")) == CONTENT


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
    assert publish(checkpoint, uri).folder
    assert read(fetch(uri, tmp_path / "fetched")).items() >= CONTENT.items()


@pytest.mark.parametrize("ignored", [True, False], ids=["ignored", "refused"])
def test_where_a_server_knows_no_conditions_no_publisher_replaces_what_another_has_stored(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, ignored
):
    direct, prefix = open_store(s3_store_uri), f"{s3_store_uri.removeprefix('s3://')}/"
    rivals, at_work = [write(tmp_path / "rival", RIVAL)], threading.Event()

    def without_conditions(request, forward):
        name = request.path.rpartition("/")[2] if request.method == "PUT" else ""
        is_condition = "If-None-Match" in request.headers
        if at_work.is_set() and name == "MANIFEST.json":
            return Reply(status=403)  # the rival does not come to an end
        # At the worst moment: a file is stored, and no record says so yet.
        if rivals and (name == "MANIFEST.json" or (name == "_UPLOADED.json" and not is_condition)):
            at_work.set()
            with pytest.raises(StorageError, match="MANIFEST"):
                publish(rivals.pop(), s3_store_uri)
            at_work.clear()
        if is_condition and not ignored:
            return Reply(status=501, body=b"<Error><Code>NotImplemented</Code></Error>")
        if is_condition:
            direct.delete(request.path.partition(prefix)[2])  # the header is signed: it cannot be taken away
        return forward()

    with behind(s3_server, without_conditions, monkeypatch):
        publish(checkpoint, s3_store_uri)
    assert rivals == []
    assert read(fetch(s3_store_uri, tmp_path / "fetched")) == CONTENT
    tried = (
        f"a server that {'ignores' if ignored else 'refuses'} If-None-Match, and a rival at the worst moment"
    )
    note("Publishing", tried, "each publisher kept to a folder of its own; nothing was replaced")


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
        fetch(s3_store_uri, tmp_path / "fetched")
    assert read(tmp_path / "fetched") == {path: data for path, data in CONTENT.items() if path != broken}

    (tmp_path / "fetched/config.json").write_bytes(b"{")  # a file that does not verify is fetched again
    seen: list[tuple[str, str]] = []
    with behind(s3_server, count_requests(seen), monkeypatch):
        fetch(s3_store_uri, tmp_path / "fetched")
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


def flip(store, path):
    data = bytearray(store.read_bytes(path))
    data[len(data) // 2] ^= 1
    store.write_bytes(path, bytes(data))


def swap(store, path):
    other = "model-00002.safetensors"
    mine = store.read_bytes(path)
    store.write_bytes(path, store.read_bytes(other))
    store.write_bytes(other, mine)


@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        ("a flipped bit", flip, f"sha256 {LAYER_0_SHA256} expected, [0-9a-f]{{64}} found"),
        (
            "a file cut short",
            lambda store, path: store.write_bytes(path, b"x" * 17),
            "18 bytes expected, 17 found",
        ),
        ("a deleted file", lambda store, path: store.delete(path), "it is missing"),
        ("two shards exchanged", swap, "18 bytes expected, 18000 found"),
    ],
)
def test_damage_is_detected_and_named_and_not_used(uri, checkpoint, tmp_path, name, damage, found):
    publish(checkpoint, uri)
    path = "model-00001.safetensors"
    damage(open_store(uri), path)
    with pytest.raises(IntegrityError, match=rf"{uri}/{path} is not what its manifest says: {found}\. "):
        fetch(uri, tmp_path / "fetched")
    assert not (tmp_path / "fetched" / path).exists()
    assert not list((tmp_path / "fetched").rglob(".*")), "no temporary file is left"
    fetch(uri, tmp_path / "fetched", only=["config.json"])
    note("Integrity", f"{name} in a store{backend(uri)}", "IntegrityError named the file; it was not used")


def test_bytes_that_change_on_the_way_are_not_used(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch
):
    publish(checkpoint, s3_store_uri)

    def change(request, forward):
        reply = forward()
        if request.method == "GET" and request.path.endswith("model-00001.safetensors"):
            headers = {k: v for k, v in reply.headers.items() if not k.lower().startswith("x-amz-checksum")}
            return Reply(status=reply.status, headers=headers, body=reply.body.replace(b"0", b"1"))
        return reply

    error = pytest.raises(IntegrityError, match=r"model-00001\.safetensors")
    with behind(s3_server, change, monkeypatch), error:
        fetch(s3_store_uri, tmp_path / "fetched")
    assert not (tmp_path / "fetched/model-00001.safetensors").exists()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m["files"][0].update(path="../x"), r"'\.\./x' leaves its folder"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), "'/etc/passwd' leaves its folder"),
        (lambda m: m["files"][0].update(path=None), "it is no list of files"),
        (lambda m: m.update(folder="../../other"), r"'\.\./\.\./other/config.json' leaves its folder"),
        (lambda m: m["files"][0].update(sha256="0" * 64), "its digest does not fit"),
        (lambda m: m["files"][0].update(sha256="00"), "config.json lacks a size in bytes or a sha256"),
        (lambda m: m["files"][0].update(size="2"), "config.json lacks a size in bytes or a sha256"),
        (lambda m: m["files"][0].update(more=1), "it is no list of files"),
        (lambda m: m["files"].pop(), "its digest does not fit"),
        (lambda m: m["files"].append(m["files"][0]), "its digest does not fit"),
        (lambda m: m.update(digest="0" * 64), "its digest does not fit"),
        (lambda m: m.update(files=7), "it is no list of files"),
        (lambda m: m.update(folder=7), "it is no list of files"),
        (lambda m: m.pop("metadata"), "it lacks 'metadata'"),
    ],
)
def test_an_edited_manifest_is_refused(uri, checkpoint, tmp_path, edit, problem):
    publish(checkpoint, uri)
    edit_manifest(uri, edit)
    with pytest.raises(IntegrityError, match=rf"{uri}/MANIFEST.json is damaged: {problem}"):
        fetch(uri, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    note(
        "Integrity",
        f"an edited manifest{backend(uri)}",
        "IntegrityError named the manifest; nothing was used",
    )


def test_a_manifest_of_another_publication_does_not_fit(uri, checkpoint, tmp_path):
    publish(checkpoint, uri)
    publish(write(tmp_path / "rival", RIVAL), join_uri(uri, "rival"))
    store = open_store(uri)
    store.write_bytes("MANIFEST.json", store.read_bytes("rival/MANIFEST.json"))
    with pytest.raises(IntegrityError, match="model-0000"):
        fetch(uri, tmp_path / "fetched")
    note("Integrity", f"the manifest of another publication{backend(uri)}", "IntegrityError named a file")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b"7", b"[" * 100_000, b'{"files": [3]}']
)
def test_a_manifest_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(IntegrityError, match=r"here is damaged: \S") as error:
        Manifest.from_json(text, where="here")
    assert "\n" not in str(error.value)


def test_a_link_in_the_place_of_a_file_is_refused(checkpoint, tmp_path):
    store = tmp_path / "store"
    publish(checkpoint, str(store))
    shutil.move(store / "tokenizer", tmp_path / "elsewhere")
    (store / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=r"tokenizer/vocab\.txt.*a file expected, a link found"):
        fetch(str(store), tmp_path / "fetched")
    note("Integrity", "a link in the place of a folder (folder)", "IntegrityError named the file behind it")
    (tmp_path / "link").symlink_to(tmp_path)  # a store that is itself reached by a link is none of this
    publish(checkpoint, f"{tmp_path}/link/other")
    assert read(fetch(f"{tmp_path}/link/other", tmp_path / "fetched")) == CONTENT


def test_links_are_published_as_the_files_they_lead_to(uri, checkpoint, tmp_path):
    shutil.move(checkpoint / "config.json", tmp_path / "blob")
    (checkpoint / "config.json").symlink_to(tmp_path / "blob")
    publish(checkpoint, uri)
    assert read(fetch(uri, tmp_path / "fetched")) == CONTENT
    (tmp_path / "blob").unlink()
    with pytest.raises(StorageError, match=r"config\.json is gone, or a link that leads nowhere"):
        publish(checkpoint, join_uri(uri, "again"))


def test_a_fetched_publication_can_be_published_again(uri, checkpoint, tmp_path):
    manifest = publish(checkpoint, uri)
    folder = fetch(uri, tmp_path / "fetched")
    (folder / f".config.json.{os.urandom(4).hex()}.part").write_bytes(b"left by a killed process")
    assert publish(folder, join_uri(uri, "again")).digest == manifest.digest


def test_a_directory_without_files_is_not_published(uri, tmp_path):
    with pytest.raises(StorageError, match="missing holds no file to publish"):
        publish(tmp_path / "missing", uri)


def test_what_is_not_kept_loses_its_files_but_stays_done(uri, checkpoint, tmp_path):
    manifest = publish(checkpoint, uri)
    delete_publication(uri, keep_manifest=True)
    assert sorted(open_store(uri).list()) == ["MANIFEST.json"]
    assert publish(checkpoint, uri) == manifest
    with pytest.raises(IntegrityError, match="it is missing"):
        fetch(uri, tmp_path / "fetched")
    delete_publication(uri, keep_manifest=False)
    delete_publication(uri, keep_manifest=False)
    assert list(open_store(uri).list()) == []
    publish(checkpoint, uri)
    assert read(fetch(uri, tmp_path / "fetched")) == CONTENT


def test_deleting_spares_what_the_publication_does_not_hold(uri, checkpoint):
    open_store(uri).write_bytes("_resume/state.json", b"{}")
    publish(checkpoint, uri)
    delete_publication(uri, keep_manifest=False)
    assert list(open_store(uri).list()) == ["_resume/state.json"]
