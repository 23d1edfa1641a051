from pathlib import Path

import pytest

from tests.support.doctor import node
from tests.support.kfp_api import run_kfp_api
from tests.support.kfp_trial import forget_kfp, write_trial
from tests.support.kubernetes_api import serving


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


@pytest.fixture
def quick(monkeypatch):
    """The doctor looks often, and soon gives an image up."""
    monkeypatch.setattr("pipelines.remote.doctor._IMAGE_S", 0.05)
    monkeypatch.setattr("pipelines.commands.checking.EVERY_S", 0.01)


@pytest.fixture
def kubernetes(tmp_path):
    """A cluster in which everything is there, and its kubeconfig."""
    with serving(tmp_path) as (api, kubeconfig):
        place = {"name": "adapt-pruner", "namespace": "kubeflow"}
        keys = {key: "eA==" for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        api.add("secrets", {"metadata": place, "data": keys})
        addresses = {"AWS_ENDPOINT_URL": "http://s3:9000", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
        api.add("configmaps", {"metadata": place, "data": addresses})
        for name, resources in (("small", {}), ("cpu", {}), ("gpu", {"nvidia.com/gpu": "8"})):
            cpu = "2" if name == "small" else "32"
            api.add("nodes", node(name, {"cpu": cpu, "memory": "131072Mi", **resources}))
        yield api, kubeconfig
