import hashlib
import random

import boto3
import pytest

from core.errors import StorageError
from core.storage.manifest import OWN, fetch, publish, read_manifest
from core.storage.store import open_store
from tests import faults
from tests.evidence import note
from tests.faults import Striking, goes_down, goes_up, of
from tests.publications import behind, read, write
from tests.servers import BUCKET

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
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff._BASE", 0.01)
    monkeypatch.setattr("core.storage.s3._READ_TIMEOUT_S", 1)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "test-secret-key" not in message
    return message


def unfinished(uri):
    return list(open_store(uri).unfinished())


@pytest.mark.parametrize("name", faults.UP)
def test_faults_that_pass_on_the_way_up_cost_only_time(
    s3_server, s3_store_uri, checkpoint, tmp_path, monkeypatch, name
):
    striking = Striking(faults.UP[name], goes_up, times=2)
    with behind(s3_server, striking, monkeypatch):
        publish(checkpoint, s3_store_uri)
    print(len(striking.struck), sorted(open_store(s3_store_uri).list()))
    assert {method for method, *_ in striking.struck} == {"PUT", "POST"}
    assert read_manifest(s3_store_uri).folder == ""
    assert read(fetch(s3_store_uri, tmp_path / "fetched")) == CONTENT
    assert unfinished(s3_store_uri) == []
