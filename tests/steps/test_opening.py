"""Whose turn it is: pipelines that meet an execution at work, a dead one, or one that is about to end."""

import contextlib
import os
import threading
import time

import pytest
from mlflow import MlflowClient

from core.runs.run import Run
from core.steps import opening
from core.steps.finalize import run_finalize
from core.steps.needs_run import run_needs_run
from core.steps.prepare_data import run_prepare_data
from core.storage import lease as lease_module
from core.storage.lease import read_lease, release_lease, take_lease
from core.storage.manifest import Manifest
from core.storage.owner import LOCAL, Owner
from core.storage.publication import find_publication
from tests.support.evidence import note
from tests.support.project import recipe_with, resolve, resolve_or_tell

TABLE = "Leases and cleaning"


@pytest.fixture(autouse=True)
def in_a_pod(monkeypatch):
    monkeypatch.delenv(LOCAL, raising=False)
    monkeypatch.setattr(lease_module, "LOOK_S", 0.05)


@pytest.fixture
def recipe(store, project, tmp_path):
    changes = {"storage.store": store.uri, "training.tokens": "0", "training.sources": []}
    with contextlib.chdir(project):
        yield recipe_with(changes | {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})


def everything(store):
    """All files of a store with their content, but for the lease."""
    return {key: store.read_bytes(key) for key in store.list() if "/_lease/" not in key}


def status_in_mlflow(folder):
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return parent.info.status


@contextlib.contextmanager
def soon(action, *, after_s=0.3):
    """Call ``action`` while the block runs, after a while."""
    timer = threading.Timer(after_s, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@contextlib.contextmanager
def renewing(handle):
    """Let an execution show again and again that it lives, while the block runs."""
    ended = threading.Event()

    def renew():
        while not ended.wait(0.1):
            opening.show_life(handle)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_pipeline_that_meets_its_run_at_work_has_nothing_to_do_and_touches_nothing(recipe, store, tmp_path):
    handle, base_uri = resolve(recipe, job="first")
    run_prepare_data(run=handle, base_uri=base_uri)
    before = everything(store)
    with renewing(handle):
        told, _, other = resolve_or_tell(recipe | {"name": "another"}, job="second")
    assert other.startswith("job first on ")
    assert "which renewed its lease at 2" in other
    assert told == handle | {"job": "second"}
    assert not run_needs_run(run=told, being_done_by=other).phase
    run_finalize(store=store.uri, job="second", succeeded=True)
    assert everything(store) == before
    assert read_lease(store, Run.load(handle).folder).owner.job == "first"
    assert status_in_mlflow(tmp_path) == "RUNNING"
    note(
        TABLE,
        "a pipeline starts while another works on its run",
        "it succeeds, names that one, changes nothing",
    )


def test_a_task_that_lost_its_lease_between_two_attempts_does_not_close_the_others_run(
    recipe, store, tmp_path
):
    handle, _ = resolve(recipe, job="second")
    release_lease(store, f"runs/{handle['key']}", "second")
    other, _ = resolve(recipe, job="first")
    with renewing(other):
        assert resolve_or_tell(recipe, job="second")[2].startswith("job first on ")
    run_finalize(store=store.uri, job="first", succeeded=False)
    run_finalize(store=store.uri, job="second", succeeded=True)
    assert status_in_mlflow(tmp_path) == "FAILED"


def test_who_finds_all_done_gets_what_it_asked_for_though_it_was_measured_otherwise_since(
    recipe, store, monkeypatch
):
    handle, _ = resolve(recipe, job="first")
    otherwise = recipe | {"evaluation": recipe["evaluation"] | {"perplexity_length": 8}}
    asked = Run.load(handle).settings.measured_digest()
    monkeypatch.setattr(Run, "is_complete", lambda run: run.settings.measured_digest() == asked)
    release_lease(store, f"runs/{handle['key']}", "first")
    before = everything(store)
    assert resolve(recipe, job="again")[0]["key"] == handle["key"]
    assert {k: v for k, v in everything(store).items() if k != "jobs/again.json"} == before
    other, _ = resolve(otherwise, job="second")
    assert other["key"] == handle["key"]
    assert Run.load(other).settings.measured_digest() != asked
    with renewing(other):
        told, _, working = resolve_or_tell(recipe, job="third")
    assert working.startswith("job second on ")
    release_lease(store, f"runs/{handle['key']}", "second")
    resolve(recipe, job="third")
    assert Run.load(told).settings.measured_digest() == asked
    assert read_lease(store, f"runs/{handle['key']}") is None, "there is nothing to work on"


def test_a_dead_executions_lease_is_waited_for_and_taken_over(recipe, store):
    handle, _ = resolve(recipe, job="dead")
    folder = f"runs/{handle['key']}"
    take_lease(store, folder, Owner.of("dead"), ttl_s=1.5)
    started = time.monotonic()
    again, _ = resolve(recipe, job="second")
    assert 0.5 < time.monotonic() - started < 30
    assert run_needs_run(run=again, being_done_by="").phase
    assert read_lease(store, folder).owner.job == "second"
    note(
        TABLE,
        "a pipeline starts while the lease of a dead one still holds",
        "waits for its end; takes it over",
    )


def test_a_run_that_fails_meanwhile_is_taken_up(recipe, store):
    handle, _ = resolve(recipe, job="first")
    with soon(lambda: release_lease(store, f"runs/{handle['key']}", "first")):
        resolve(recipe, job="second")
    assert read_lease(store, f"runs/{handle['key']}").owner.job == "second"


def test_a_run_that_is_published_meanwhile_is_done(recipe, store):
    handle, _ = resolve(recipe, job="first")

    def publish():
        store.write_bytes(f"runs/{handle['key']}/final/MANIFEST.json", Manifest(files=()).to_json().encode())
        store.write_bytes(f"runs/{handle['key']}/DONE.json", b"{}")
        release_lease(store, f"runs/{handle['key']}", "first")

    with soon(publish):
        again, _ = resolve(recipe, job="second")
    assert not run_needs_run(run=again, being_done_by="").phase
    assert read_lease(store, f"runs/{handle['key']}") is None


def test_of_pipelines_that_start_at_once_exactly_one_works(recipe, store):
    handle, _ = resolve(recipe, job="job")
    release_lease(store, f"runs/{handle['key']}", "job")
    told, ended, gate = {}, threading.Event(), threading.Barrier(5)

    def start(job):
        run = Run.load(handle | {"job": job})
        gate.wait()
        told[job] = opening.open_run(run)
        while not told[job] and not ended.wait(0.05):
            opening.show_life(run.handle())

    threads = [threading.Thread(target=start, args=(f"job-{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(told) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    (owner,) = [job for job, other in told.items() if not other]
    assert {other.split(" on ")[0] for other in told.values() if other} == {f"job {owner}"}
    note(TABLE, "five pipelines of one run start at once", "one works, four succeed and name it")


def test_tasks_that_have_nothing_to_compute_show_that_their_run_lives(recipe, store):
    handle, base_uri = resolve(recipe, job="first")
    folder = f"runs/{handle['key']}"

    def renewed_by(action):
        before = read_lease(store, folder).renewed_s
        action()
        return read_lease(store, folder).renewed_s > before

    assert renewed_by(lambda: run_prepare_data(run=handle, base_uri=base_uri))
    assert renewed_by(lambda: run_prepare_data(run=handle, base_uri=base_uri))  # it is published
    assert renewed_by(lambda: run_needs_run(run=handle, being_done_by="").phase)
    other = handle | {"job": "second"}
    assert not renewed_by(lambda: run_prepare_data(run=other, base_uri=base_uri))
    assert not renewed_by(lambda: run_needs_run(run=other, being_done_by="").phase)
    assert find_publication(Run.load(handle).uri("data")) is not None


def test_a_local_run_does_not_wait(recipe, store, monkeypatch):
    resolve(recipe, job="first")
    monkeypatch.setenv(LOCAL, str(os.getpid()))
    monkeypatch.setattr(lease_module, "LOOK_S", 3600.0)
    with pytest.raises(lease_module.LeaseError, match="Wait until then, or end that execution first"):
        resolve(recipe, job="second")
