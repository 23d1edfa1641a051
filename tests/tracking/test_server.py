"""A real MLflow server behind a proxy: whatever request fails, nothing is there twice."""

import contextlib
import threading

import pytest

from core.errors import TrackingError
from core.settings.storage import TrackingSettings
from core.tracking import client as client_module
from core.tracking.client import connect
from core.tracking.mlflow import open_tracker
from core.tracking.presentation import DataSet
from core.tracking.registry import register
from tests.support.evidence import note
from tests.support.servers import HangUp, Reply, S3Server, mlflow_server, s3_proxy

pytestmark = pytest.mark.slow

TEXTS = DataSet(name="c4", digest="0a1b", source_type="local", source='{"uri": "c4"}', context="training")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as place:
        yield f"http://{place}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setattr(client_module, "_PAUSE_S", 0.0)


def track(uri, key):
    """What a run logs, from its opening to its registered result."""
    tracker = open_tracker(TrackingSettings(uri=uri, experiment="faults"), key=key, name="a run")
    tracker.start({"seed": 1}, {}, [TEXTS])
    with tracker.child(1, "evaluate") as child:
        child.log_metrics({"seconds": 2.0})
    tracker.log_phase(1, {"perplexity": 30.5, "params": 100})
    model, where = f"model-{key}", f"s3://models/{key}"
    register(tracker, model, where, params={"base": "b"}, phase=1, data_set=(TEXTS.name, TEXTS.digest))
    tracker.finish("FINISHED")


def what_there_is(client, key):
    """Return everything of a run as counts and values, the numbers of its versions aside."""
    (experiment,) = [each for each in client.search_experiments() if each.name == "faults"]
    runs = client.search_runs([experiment.experiment_id], f"tags.`adapt_pruner.key` = '{key}'")
    (parent,) = runs
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([experiment.experiment_id], query)
    models = client.search_logged_models([experiment.experiment_id], f"tags.`adapt_pruner.key` = '{key}'")
    versions = client.search_model_versions(f"name = 'model-{key}'")
    candidate = client.get_model_version_by_alias(f"model-{key}", "candidate")
    return {
        "status": [parent.info.status, *(child.info.status for child in children)],
        "points": {
            (name, point.step, point.value): len(client.get_metric_history(run.info.run_id, name))
            for run in (parent, *children)
            for name in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, name)
        },
        "models": [(model.status, sorted((m.key, m.value) for m in model.metrics)) for model in models],
        "outputs": [output.model_id for output in parent.outputs.model_outputs] == [models[0].model_id],
        "inputs": [each.dataset.name for each in parent.inputs.dataset_inputs],
        "versions": len(versions),
        "candidate": candidate.version == versions[0].version,
    }


def failing(number, kind, counted):
    """Spoil the request of a number: lose its answer, or refuse it and all that follow."""

    def spoil(request, forward):
        counted.append(request)
        if kind == "the answer is lost" and len(counted) == number:
            forward()
            raise HangUp
        if kind == "an outage begins" and len(counted) >= number:
            return Reply(status=503)
        return forward()

    return spoil


@pytest.mark.parametrize("kind", ["the answer is lost", "an outage begins"])
def test_a_failure_at_any_request_leaves_nothing_twice(server, kind):
    direct, seen = connect(server), []
    with s3_proxy(S3Server(endpoint=server), failing(0, "", seen)) as proxy:
        track(proxy.endpoint, "whole")
    expected, requests = what_there_is(direct, "whole"), len(seen)
    assert expected["status"] == ["FINISHED", "FINISHED"]
    assert expected["versions"] == 1
    assert requests > 20
    failed = 0
    for number in range(1, requests + 1):
        key, counted = f"{kind.split()[1]}-{number}", []
        with s3_proxy(S3Server(endpoint=server), failing(number, kind, counted)) as proxy:
            try:
                track(proxy.endpoint, key)
            except TrackingError:
                failed += 1
            with contextlib.suppress(TrackingError):
                track(server, key)  # as the retried step does
        assert what_there_is(direct, key) == expected, f"{kind} at request {number}"
    assert (failed == requests) == (kind == "an outage begins")
    note(
        "Faults",
        f"MLflow, from opening a run to its registered result: {kind}",
        "nothing is there twice",
        requests,
    )


def test_processes_that_open_one_run_at_once_share_it(server):
    """Each has found nothing before any creates."""
    together, ids = threading.Barrier(3), []

    def open_run():
        tracker = open_tracker(TrackingSettings(uri=server, experiment="faults"), key="once", name="a run")
        tracker.client  # noqa: B018
        together.wait(timeout=60)
        with contextlib.suppress(TrackingError):
            ids.append(tracker.parent_run_id)

    threads = [threading.Thread(target=open_run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = connect(server)
    experiment = client.get_experiment_by_name("faults").experiment_id
    (left,) = client.search_runs([experiment], "tags.`adapt_pruner.key` = 'once'")
    assert left.info.run_id in ids
