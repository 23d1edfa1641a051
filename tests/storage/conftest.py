import pytest

from core.storage.interface import join_uri
from tests.support.publications import write


@pytest.fixture
def uri(store_uri):
    """Where nothing is published yet: in a folder, and on a real S3 server."""
    return join_uri(store_uri, "runs/key/phases/01/pruned")


@pytest.fixture
def checkpoint(request, tmp_path):
    """A folder with the files that the test module has as ``CONTENT``."""
    return write(tmp_path / "checkpoint", request.module.CONTENT)


@pytest.fixture
def short_pauses(monkeypatch):
    """Pause shortly between attempts; give a server up soon that does not answer."""
    monkeypatch.setattr("core.storage.s3_retries._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("core.storage.s3._READ_TIMEOUT_S", 0.5)
