import logging
import os
import shutil

import pytest

from core.errors import IntegrityError, StorageError
from core.storage.interface import join_uri
from core.storage.publication import find_publication, open_publication, publish
from core.storage.store import open_store
from tests.support.publications import CONTENT, LAYER_0_SHA256, RIVAL, die_before_the_manifest, read, write


def test_what_is_published_is_fetched(uri, checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    published = publish(checkpoint, uri, metadata={"params": 108_000_000, "phases": [1, 2]})
    assert open_publication(uri) == published
    manifest = published.manifest
    assert manifest.metadata == {"params": 108_000_000, "phases": [1, 2]}
    assert [entry.path for entry in manifest.files] == sorted(CONTENT)
    assert manifest.files[2].sha256 == LAYER_0_SHA256
    assert manifest.total_bytes == sum(map(len, CONTENT.values()))
    assert read(open_publication(uri).fetch(tmp_path / "fetched")) == CONTENT
    assert f"published {uri}: 5 files" in caplog.text


def test_a_folder_is_fetched_where_it_is(checkpoint, tmp_path):
    uri = f"file://{tmp_path}/store/pruned"
    publish(checkpoint, uri)
    assert open_publication(uri).fetch(tmp_path / "unused") == tmp_path / "store/pruned"
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
    directory = open_publication(s3_store_uri).fetch(tmp_path / "fetched", only=wanted)
    assert read(directory) == {path: CONTENT[path] for path in wanted}
    with pytest.raises(StorageError, match=r"holds no file model\.bin"):
        open_publication(s3_store_uri).fetch(tmp_path / "fetched", only=["config.json", "model.bin"])


def test_a_directory_without_a_manifest_is_not_readable(uri, checkpoint, tmp_path):
    publish(checkpoint, uri)
    die_before_the_manifest(uri)
    assert find_publication(uri) is None
    with pytest.raises(StorageError, match=f"{uri} is not published: no MANIFEST.json") as error:
        open_publication(uri).fetch(tmp_path / "fetched")
    assert not isinstance(error.value, IntegrityError)


def test_the_first_publication_stays(uri, checkpoint, tmp_path):
    first = publish(checkpoint, uri)
    assert publish(write(tmp_path / "rival", RIVAL), uri) == first
    assert read(open_publication(uri).fetch(tmp_path / "fetched")) == CONTENT


def test_links_are_published_as_the_files_they_lead_to(uri, checkpoint, tmp_path):
    shutil.move(checkpoint / "config.json", tmp_path / "blob")
    (checkpoint / "config.json").symlink_to(tmp_path / "blob")
    publish(checkpoint, uri)
    assert read(open_publication(uri).fetch(tmp_path / "fetched")) == CONTENT
    (tmp_path / "blob").unlink()
    with pytest.raises(StorageError, match=r"config\.json is gone, or a link that leads nowhere"):
        publish(checkpoint, join_uri(uri, "again"))


def test_a_fetched_publication_can_be_published_again(uri, checkpoint, tmp_path):
    manifest = publish(checkpoint, uri)
    folder = open_publication(uri).fetch(tmp_path / "fetched")
    (folder / f".config.json.{os.urandom(4).hex()}.part").write_bytes(b"left by a killed process")
    assert publish(folder, join_uri(uri, "again")).digest == manifest.digest


def test_a_directory_without_files_is_not_published(uri, tmp_path):
    with pytest.raises(StorageError, match="missing holds no file to publish"):
        publish(tmp_path / "missing", uri)


def test_what_is_not_kept_loses_its_files_but_stays_done(uri, checkpoint, tmp_path):
    published = publish(checkpoint, uri)
    assert published.is_whole()
    published.delete(keep_manifest=True)
    assert sorted(open_store(uri).list()) == ["MANIFEST.json"]
    assert not published.is_whole()
    assert publish(checkpoint, uri) == published
    with pytest.raises(IntegrityError, match="it is missing"):
        open_publication(uri).fetch(tmp_path / "fetched")
    published.delete()
    published.delete()
    assert list(open_store(uri).list()) == []
    publish(checkpoint, uri)
    assert read(open_publication(uri).fetch(tmp_path / "fetched")) == CONTENT


def test_deleting_spares_what_the_publication_does_not_hold(uri, checkpoint):
    open_store(uri).write_bytes("_resume/state.json", b"{}")
    publish(checkpoint, uri)
    open_publication(uri).delete()
    assert list(open_store(uri).list()) == ["_resume/state.json"]
