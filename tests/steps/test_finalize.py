"""finalize and MLflow: a run that was done before stays as it is there, and an outage holds nothing up."""

import pytest

from core.errors import TrackingError
from core.runs.run import Run
from core.steps.finalize import run_finalize
from core.steps.frame import tracker_of
from core.storage.lease import read_lease, take_lease
from core.storage.owner import LOCAL, Owner
from core.storage.store import open_store
from tests.support.stored_runs import write_run

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("MLFLOW_RUN_ID", LOCAL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def run(tmp_path):
    """A run that is done, and FINISHED in MLflow."""
    handle = {
        "store": str(tmp_path / "store"),
        "key": write_run(tmp_path / "store", "demo", phases=1, layers=2),
    }
    run = Run.load(handle | {"job": "nightly"})
    tracker = tracker_of(run)
    tracker.start({"seed": 1}, {})
    tracker.finish("FINISHED")
    return run


def finalize(run, *, worked=False, succeeded=True):
    """What the last task of the execution does, once resolve-base has noted the run."""
    open_store(run.store).write_bytes(f"jobs/{run.job}.json", run.pointer())
    if worked:
        take_lease(open_store(run.store), run.folder, Owner.of(run.job))
    run_finalize(store=run.store, job=run.job, succeeded=succeeded)


def left(run):
    """The pointers, and the lease, of a run."""
    store = open_store(run.store)
    return list(store.list("jobs/")), read_lease(store, run.folder)


def parents(run):
    client = tracker_of(run).client
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments)


def test_a_run_that_was_done_before_keeps_its_end_in_mlflow(run):
    before = [parent.to_dictionary() for parent in parents(run)]
    for _ in range(2):
        finalize(run)
    assert [parent.to_dictionary() for parent in parents(run)] == before
    assert left(run) == ([], None)


def test_a_run_that_a_user_has_deleted_in_mlflow_does_not_come_back(run):
    tracker = tracker_of(run)
    tracker.client.delete_run(tracker.parent_run_id)
    finalize(run)
    assert parents(run) == []


def test_a_run_that_is_done_and_counts_as_running_is_finished_by_the_next_execution(run):
    tracker = tracker_of(run)
    tracker.client.update_run(tracker.parent_run_id, status="RUNNING")
    finalize(run)
    assert [parent.info.status for parent in parents(run)] == ["FINISHED"]


def test_an_execution_with_nothing_to_do_does_not_fail_with_mlflow(run, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    finalize(run)
    assert f"MLflow at {NOWHERE} cannot be reached" in caplog.text
    assert left(run) == ([], None)


@pytest.mark.parametrize("done", [True, False])
def test_an_execution_that_has_worked_gives_its_lease_back_and_tries_again(run, monkeypatch, done):
    tracker = tracker_of(run)
    tracker.client.update_run(tracker.parent_run_id, status="RUNNING")
    if not done:
        open_store(run.store).delete(f"{run.folder}/DONE.json")
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", NOWHERE)
        with pytest.raises(TrackingError, match="cannot be reached"):
            finalize(run, worked=True, succeeded=done)
    assert left(run) == (["jobs/nightly.json"], None)
    run_finalize(store=run.store, job=run.job, succeeded=done)
    assert [parent.info.status for parent in parents(run)] == ["FINISHED" if done else "FAILED"]
    assert left(run) == ([], None)
