"""docker/kubernetes/trial applied: a run whose store, whose MLflow and whose database are its pods."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from core.storage.publication import open_publication, publish
from tests.cluster.test_launcher import final_of
from tests.support.kubeflow import Objects, wait_until
from tests.support.manifests import MANIFESTS, environment, pod, render

IMAGES = {"mlflow": "MLFLOW_IMAGE", "postgres": "POSTGRES_IMAGE", "seaweedfs": "SEAWEEDFS_IMAGE"}
CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "data-mlflow-database-0"},
}
"""What Kubernetes keeps when the stateful set of the database is removed."""
PODS_S = 600
"""How long pods of the trial may take to be ready."""


@pytest.fixture
def trial(own_cluster):
    """The trial of the manifests, applied: none of it is left at the end."""
    missing = [variable for variable in IMAGES.values() if not os.environ.get(variable)]
    if missing or shutil.which("kubectl") is None:
        pytest.skip(f"not there: {', '.join(missing) or 'kubectl'}")
    cluster = Objects(own_cluster.namespace)
    objects = render(MANIFESTS / "trial", {name: os.environ[IMAGES[name]] for name in IMAGES})
    for each in objects:
        each["metadata"]["namespace"] = own_cluster.namespace
    if installed := [each["metadata"]["name"] for each in [*objects, CLAIM] if cluster.find(each)]:
        pytest.skip(f"the namespace has its own {', '.join(installed)}")
    servers = {each["metadata"]["name"]: each for each in objects if pod(each)}
    try:
        for each in objects:
            cluster.apply(each)
        for name, server in servers.items():
            wait_until(lambda one=server: cluster.ready(one), PODS_S, f"{name} is not ready")
        yield cluster, servers
    finally:
        for each in objects:
            cluster.delete(each)
        cluster.delete(CLAIM)
        wait_until(lambda: not pods_of(own_cluster, *servers), PODS_S, "pods of the trial do not end")


def pods_of(kubeflow, *names):
    """Name of each pod of these servers, by its uid."""
    selector = f"app.kubernetes.io/name in ({', '.join(names)})"
    found = kubeflow.core.list_namespaced_pod(kubeflow.namespace, label_selector=selector).items
    return {each.metadata.uid: each.metadata.name for each in found}


@contextlib.contextmanager
def forwarded(namespace, service, port):
    """The address on this machine at which a service of the cluster answers."""
    command = ["kubectl", "--namespace", namespace, "port-forward", f"service/{service}", f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            (local,) = re.findall(r"127\.0\.0\.1:(\d+) ->", process.stdout.readline())
            yield f"http://localhost:{local}"
        finally:
            process.terminate()


def test_a_run_on_the_servers_of_the_trial(trial, own_cluster, project, tmp_path, monkeypatch):
    """Their S3 server is its store; its figures are in their MLflow, and outlive the pods of that."""
    cluster, servers = trial
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")  # S3 has another address here
    for name, value in environment(MANIFESTS / "base/secret.env.example").items():
        monkeypatch.setenv(name, value)
    with forwarded(own_cluster.namespace, "trial-s3", 8333) as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
        publish(project / "base", "s3://adapt-pruner/base")
        changes = {"model.base": "s3://adapt-pruner/base", "storage.store": "s3://adapt-pruner/store"}
        recipe = own_cluster.recipe("", changes | {"tracking.model_name": "trial"})
        recipe["cluster"] |= {"secret": "adapt-pruner", "config_map": "adapt-pruner"}
        code, text = own_cluster.submit(recipe, tmp_path).end()
        assert code == 0, text
        final = Path(open_publication(final_of(recipe)).fetch(tmp_path / "final"))
        assert (final / "report.html").exists()

    with forwarded(own_cluster.namespace, "mlflow", 5000) as address:
        tracked = content(address, tmp_path / "before")
    assert any("perplexity" in name for metrics in tracked["metrics"].values() for name in metrics)
    assert tracked["files"]
    assert tracked["versions"] == ["1"]
    for name in ("mlflow-database", "mlflow"):
        before = pods_of(own_cluster, name)
        for removed in before.values():
            own_cluster.delete_pod(removed)

        def is_back(name=name, before=before):
            return not pods_of(own_cluster, name).keys() & before and cluster.ready(servers[name])

        wait_until(is_back, PODS_S, f"{name} does not come back")
    with forwarded(own_cluster.namespace, "mlflow", 5000) as address:
        assert content(address, tmp_path / "after") == tracked


def content(address, folder):
    """All that an MLflow server has of the experiment, its files included."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address)
    (experiment,) = client.search_experiments(filter_string="name = 'adapt-pruner'")
    runs = client.search_runs([experiment.experiment_id])
    for run in runs:
        for each in client.list_artifacts(run.info.run_id):
            client.download_artifacts(run.info.run_id, each.path, str(folder / run.info.run_id))
    return {
        "metrics": {run.info.run_id: run.data.metrics for run in runs},
        "files": {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        },
        "versions": [each.version for each in client.search_model_versions("name = 'trial'")],
    }
