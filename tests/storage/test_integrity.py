import json
import shutil
from collections.abc import Callable

import pytest

from core.errors import IntegrityError
from core.storage.interface import join_uri
from core.storage.publication import Manifest, open_publication, publish
from core.storage.store import open_store
from tests.support.evidence import note
from tests.support.publications import CONTENT, LAYER_0_SHA256, RIVAL, backend, behind, read, write
from tests.support.servers import Reply


def edit_manifest(uri: str, edit: Callable[[dict], object]) -> None:
    store = open_store(uri)
    data = json.loads(store.read_bytes("MANIFEST.json"))
    edit(data)
    store.write_bytes("MANIFEST.json", json.dumps(data).encode())


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
    published = open_publication(uri)
    for read_it in (lambda: published.fetch(tmp_path / "fetched"), lambda: published.read_bytes(path)):
        with pytest.raises(IntegrityError, match=rf"{uri}/{path} is not what its manifest says: {found}\. "):
            read_it()
    assert not (tmp_path / "fetched" / path).exists()
    assert not list((tmp_path / "fetched").rglob(".*")), "no temporary file is left"
    published.fetch(tmp_path / "fetched", only=["config.json"])
    assert published.read_json("config.json") == {}
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
        open_publication(s3_store_uri).fetch(tmp_path / "fetched")
    assert not (tmp_path / "fetched/model-00001.safetensors").exists()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m["files"][0].update(path="../x"), r"'\.\./x' leaves its folder"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), "'/etc/passwd' leaves its folder"),
        (lambda m: m["files"][0].update(path=None), r"files\.0\.path: input should be a valid string"),
        (lambda m: m.update(folder="../../other"), r"'\.\./\.\./other/config.json' leaves its folder"),
        (lambda m: m["files"][0].update(sha256="0" * 64), "its digest does not fit"),
        (lambda m: m["files"][0].update(sha256="00"), "config.json lacks a sha256"),
        (lambda m: m["files"][0].update(size="2"), r"files\.0\.size: input should be a valid integer"),
        (lambda m: m["files"].pop(), "its digest does not fit"),
        (lambda m: m["files"].append(m["files"][0]), "its digest does not fit"),
        (lambda m: m.update(digest="0" * 64), "its digest does not fit"),
        (lambda m: m.update(files=7), "files: input should be a valid array"),
        (lambda m: m.update(folder=7), "folder: input should be a valid string"),
        (lambda m: m.pop("digest"), "it lacks digest"),
    ],
)
def test_an_edited_manifest_is_refused(uri, checkpoint, tmp_path, edit, problem):
    publish(checkpoint, uri)
    edit_manifest(uri, edit)
    with pytest.raises(IntegrityError, match=rf"{uri}/MANIFEST.json is damaged: {problem}"):
        open_publication(uri).fetch(tmp_path / "fetched")
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
        open_publication(uri).fetch(tmp_path / "fetched")
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
        open_publication(str(store)).fetch(tmp_path / "fetched")
    with pytest.raises(IntegrityError, match="a file expected, a link found"):
        open_publication(str(store)).read_bytes("tokenizer/vocab.txt")
    note("Integrity", "a link in the place of a folder (folder)", "IntegrityError named the file behind it")
    (tmp_path / "link").symlink_to(tmp_path)  # a store that is itself reached by a link is none of this
    publish(checkpoint, f"{tmp_path}/link/other")
    assert read(open_publication(f"{tmp_path}/link/other").fetch(tmp_path / "fetched")) == CONTENT
