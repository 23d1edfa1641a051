from pathlib import Path

import pytest

from tests.support.kfp_api import run_kfp_api
from tests.support.kfp_trial import forget_kfp, write_trial


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    forget_kfp(monkeypatch)
    monkeypatch.setattr("pipelines.remote.following._SHORTEST_PAUSE_S", 0.001)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The name of a recipe in the current folder that can be submitted."""
    return write_trial(tmp_path, monkeypatch)


@pytest.fixture
def submission(recipe):
    from core.settings.recipe import load_recipe
    from pipelines.remote.submission import prepare

    return prepare(load_recipe(Path(recipe)))


@pytest.fixture
def api():
    """A stand-in for the API of Kubeflow Pipelines."""
    with run_kfp_api() as running:
        yield running
