"""Runs that MLflow takes for running: which of them have died, the lease in the store tells."""

import json
import time

import pytest
from click.testing import CliRunner

from core.settings.storage import TrackingSettings
from core.steps import closing
from core.steps.closing import close_dead_runs
from core.storage.lease import Lease
from core.storage.owner import LOCAL, Owner
from core.storage.store import open_store
from core.tracking.mlflow import STORE, open_tracker
from pipelines.cli import main
from tests.support.evidence import note
from tests.support.project import recipe_with, resolve


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('closing') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", LOCAL):
        monkeypatch.delenv(name, raising=False)


def write_lease(store, key, owner, *, age_s):
    lease = Lease(number=1, owner=owner, renewed_s=time.time() - age_s)
    store.write_bytes(f"runs/{key}/_lease/0001.json", lease.to_json())


ELSEWHERE = Owner(job="job", host="afar", machine="another", pid=7, started="1")
POD = Owner(job="job", host="pod", machine="another")
HERE = Owner.of("job", pid=2**22 - 1)  # no such process


@pytest.mark.parametrize(
    ("owner", "age_s", "done", "status"),
    [
        (ELSEWHERE, 60, False, "RUNNING"),
        (ELSEWHERE, 700, False, "KILLED"),
        (HERE, 60, False, "KILLED"),
        (POD, 700, False, "RUNNING"),  # its next task may wait for a machine
        (POD, 90_000, False, "KILLED"),
        (POD, 90_000, {}, "FINISHED"),  # of an earlier version
        (POD, 90_000, {"format": 1, "measured": ["l", "m"]}, "FINISHED"),
        (POD, 90_000, {"format": 99}, "RUNNING"),  # a later version's
        (POD, 90_000, {"format": 1, "measured": ["l"]}, "KILLED"),  # while it was measured otherwise
        (None, 0, False, "KILLED"),
    ],
)
def test_the_lease_tells_which_run_has_died(uri, tmp_path, owner, age_s, done, status):
    store, key = open_store(str(tmp_path / "store")), "0a1b2c"
    settings = TrackingSettings(uri=uri, experiment=tmp_path.name)
    tracker = open_tracker(settings, key=f"{key}-m", name="a run")
    tracker.start({}, {STORE: store.uri})
    tracker.describe("words")
    with tracker.child(0, "prepare-data"):
        pass
    tracker.client.create_run(  # the child that the kill has left open
        tracker.client.get_run(tracker.parent_run_id).info.experiment_id,
        tags={"mlflow.parentRunId": tracker.parent_run_id},
    )
    assert list(close_dead_runs(tracker, store)) == [], "the store does not know the run"
    store.write_bytes(f"runs/{key}/run.json", b"{}")
    if owner is not None:
        write_lease(store, key, owner, age_s=age_s)
    if done is not False:
        store.write_bytes(f"runs/{key}/DONE.json", json.dumps(done).encode())
    assert list(close_dead_runs(tracker, open_store(str(tmp_path / "other")))) == []
    assert list(close_dead_runs(tracker, store, sparing=key)) == []
    closed = list(close_dead_runs(tracker, store))
    assert len(closed) == (status != "RUNNING")
    parent = tracker.client.get_run(tracker.parent_run_id)
    children = tracker.client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent_run_id}'"
    )
    assert parent.info.status == status
    left = "RUNNING" if status == "RUNNING" else "KILLED"
    assert sorted(child.info.status for child in children) == ["FINISHED", left]
    if status == "KILLED":
        assert "**Killed**" in parent.data.tags["mlflow.note.content"]
        assert parent.data.tags["mlflow.note.content"].endswith("words")
        again = open_tracker(settings, key=f"{key}-m", name="a run")
        with again.child(1, "calibrate"):  # it was not dead after all
            assert again.client.get_run(again.parent_run_id).info.status == "RUNNING"


def test_what_a_user_has_written_of_a_run_outlives_its_closing(uri, tmp_path):
    settings = TrackingSettings(uri=uri, experiment=tmp_path.name)
    tracker = open_tracker(settings, key="0a1b2c-m", name="a run")
    tracker.start({}, {})
    client, run_id = tracker.client, tracker.parent_run_id
    client.set_tag(run_id, "mlflow.note.content", "words of mine")
    (opened,) = tracker.running()
    tracker.close(opened, "KILLED", "**Killed**", end_s=time.time())
    closed = client.get_run(run_id).data.tags["mlflow.note.content"]
    assert closed.startswith("words of mine")
    assert "**Killed**" in closed
    open_tracker(settings, key="0a1b2c-m", name="a run").describe("words of ours")
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == closed


def test_the_next_run_and_clean_close_what_was_killed(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    places = {"storage.store": str(tmp_path / "store"), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}

    def statuses():
        client = open_tracker(TrackingSettings(uri=places["tracking.uri"]), key="", name="").client
        (experiment,) = [each for each in client.search_experiments() if each.name == "adapt-pruner"]
        runs = client.search_runs([experiment.experiment_id])
        return [run.info.status for run in sorted(runs, key=lambda run: run.info.start_time)]

    first, _ = resolve(recipe_with(places), job="first")
    write_lease(open_store(places["storage.store"]), first["key"], HERE, age_s=60)
    second, _ = resolve(recipe_with(places | {"seed": 8}), job="second")
    assert statuses() == ["KILLED", "RUNNING"]
    write_lease(open_store(places["storage.store"]), second["key"], HERE, age_s=60)
    result = CliRunner().invoke(main, ["clean", places["storage.store"], "--yes"])
    assert result.exit_code == 0, result.output
    assert f"run {second['key']}: **Killed**" in result.output
    assert statuses() == ["KILLED", "KILLED"]
    monkeypatch.setattr(closing, "sqlite_file", lambda _: tmp_path / "nowhere")
    assert CliRunner().invoke(main, ["clean", places["storage.store"], "--yes"]).exit_code == 0
    note("Leases and cleaning", "a run is killed; another one starts, or clean", "MLflow: KILLED, and why")
