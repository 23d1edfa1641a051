import shutil

import pytest

from tests.support.uploads import hub_of_this_process, publish_checkpoint


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A published checkpoint, not to be changed."""
    return publish_checkpoint(tmp_path_factory.mktemp("published"))


@pytest.fixture
def checkpoint(published, tmp_path):
    """A copy that the test may change, without a manifest."""
    own = shutil.ignore_patterns("MANIFEST.json")
    return shutil.copytree(published, tmp_path / "checkpoint", ignore=own)


@pytest.fixture
def hub(monkeypatch, tmp_path, caplog):
    """A stand-in for the hub, to which this process's client is led."""
    with hub_of_this_process(monkeypatch, tmp_path, caplog) as running:
        yield running
