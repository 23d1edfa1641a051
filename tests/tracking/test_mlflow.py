import http.server
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from core.errors import TrackingError
from core.settings.recipe import settings_from_dict
from core.settings.storage import TrackingSettings
from core.settings.texts import TextSource
from core.tracking.mlflow import open_tracker
from core.tracking.presentation import data_sets, run_title, summary_params

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def tracker(uri, request):
    return tracker_of(uri, request.node.name)


def tracker_of(uri, key, experiment="test"):
    """A tracker as another process would open it."""
    return open_tracker(TrackingSettings(uri=uri, experiment=experiment), key=key, name="a run")


def series(client, run_id, metric):
    return [(p.step, p.value) for p in client.get_metric_history(run_id, metric)]


def children(client, tracker):
    parent = client.get_run(tracker.parent_run_id).info
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    return client.search_runs([parent.experiment_id], query)


def test_the_parent_has_name_params_and_tags(tracker, client):
    settings = {"seed": 3, "prune": {"target": "108M"}, "training": {"sources": [{"path": "x"}]}}
    tracker.start(settings, {"team": "a"})
    run = client.get_run(tracker.parent_run_id)
    assert run.info.run_name == "a run"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "3", "prune.target": "108M", "training.sources": '[{"path": "x"}]'}
    assert run.data.tags["team"] == "a"
    tracker.finish("FINISHED")
    assert client.get_run(tracker.parent_run_id).info.status == "FINISHED"


def test_the_end_of_a_run_ends_what_a_kill_has_left_open(tracker, client):
    tracker.start({}, {})
    with tracker.child(1, "calibrate"):
        pass
    left = tracker.child(1, "recover-train")
    left.__enter__()  # and nothing ends it
    tracker.finish("FAILED")
    assert client.get_run(tracker.parent_run_id).info.status == "FAILED"
    assert sorted(run.info.status for run in children(client, tracker)) == ["FINISHED", "KILLED"]
    assert not tracker.is_logged(1, "recover-train")


def test_the_experiment_opens_as_one_of_model_training_and_keeps_what_a_user_has_set(uri, client):
    tracker_of(uri, "k", experiment="ours").start({}, {})
    tags = client.get_experiment_by_name("ours").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    users = client.create_experiment("theirs", tags={"mlflow.experimentKind": "genai_development"})
    tracker_of(uri, "k2", experiment="theirs").start({}, {})
    tags = client.get_experiment(users).tags
    assert tags["mlflow.experimentKind"] == "genai_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == "perplexity"


def test_data_sets_and_a_description_are_on_the_runs_page(uri, tracker, client):
    texts = TextSource(path="s3://bucket/c4.jsonl")
    recipe = {"model": {"base": "hf://user/base"}, "prune": {"target": "80%"}}
    settings = settings_from_dict(
        recipe | {"calibration": {"source": asdict(texts)}, "evaluation": {"perplexity": asdict(texts)}}
    )
    for _ in range(2):  # as a resumed run does
        again = tracker_of(uri, tracker.key)
        again.start(summary_params(settings), {}, data_sets(settings))
        again.describe("made by us")
    run = client.get_run(tracker.parent_run_id)
    inputs = {(each.dataset.name, each.tags[0].value) for each in run.inputs.dataset_inputs}
    assert inputs == {("c4.jsonl", "calibration"), ("c4.jsonl", "evaluation")}
    assert len(run.inputs.dataset_inputs) == 2
    assert run.data.params == {"Base": "base", "Method": "adapt-pruner", "Target": "80%"}
    assert run.data.tags["mlflow.note.content"] == "**adapt-pruner** made by us"
    client.set_tag(run.info.run_id, "mlflow.note.content", "a user's words")
    tracker_of(uri, tracker.key).describe("ours again")
    assert client.get_run(run.info.run_id).data.tags["mlflow.note.content"] == "a user's words"


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "SmolLM2-135M → 80 % adapt-pruner"),
        ({"name": "nightly", "seed": 3}, "SmolLM2-135M → 80 % adapt-pruner (nightly, seed 3)"),
        ({"model": {"base": "package:llm/SmolLM2.Q4_1.gguf"}}, "SmolLM2.Q4_1 → 80 % adapt-pruner"),
        ({"model": {"base": "models:/small@champion"}}, "small@champion → 80 % adapt-pruner"),
        ({"model": {"base": "s3://b/store/runs/0a1b/final"}}, "run 0a1b → 80 % adapt-pruner"),
        ({"prune": {"target": "108M", "method": "flap"}}, "SmolLM2-135M → 108M flap"),
    ],
)
def test_a_run_is_called_by_its_base_its_size_and_its_method(changes, title):
    recipe = {"model": {"base": "hf://HuggingFaceTB/SmolLM2-135M"}, "prune": {"target": "80%"}}
    recipe |= {"calibration": {"source": {"path": "x.txt"}}}
    assert run_title(settings_from_dict(recipe | changes)) == title


def test_another_process_finds_the_same_parent(uri, tracker, client):
    tracker.start({"seed": 3, "long": "x" * 9000}, {})
    tracker.finish("FAILED")
    again = tracker_of(uri, tracker.key)
    again.start({"seed": 4, "amplitude": 0.02}, {})  # params are immutable in MLflow: the first stay
    assert again.parent_run_id == tracker.parent_run_id
    run = client.get_run(again.parent_run_id)
    assert run.info.status == "RUNNING"
    assert (run.data.params["seed"], run.data.params["amplitude"]) == ("3", "0.02")


def test_another_key_is_another_run(uri, tracker):
    assert tracker_of(uri, "other key").parent_run_id != tracker.parent_run_id


def test_phases_are_series_with_step_equal_phase(tracker, client):
    for phase, perplexity in enumerate((24.0, 30.5, 37.25)):
        tracker.log_phase(phase, {"perplexity": perplexity, "params": 100 - phase, "arc_easy/acc,none": 0.5})
    assert series(client, tracker.parent_run_id, "perplexity") == [(0, 24.0), (1, 30.5), (2, 37.25)]
    assert series(client, tracker.parent_run_id, "arc_easy/acc_none") == [(0, 0.5), (1, 0.5), (2, 0.5)]


def test_logging_the_same_again_changes_nothing(uri, tracker, client):
    metrics = {"a": 1.5, "count": 3, "nan": float("nan"), "inf": float("inf"), "missing": None}
    tracker.log_phase(1, metrics)
    time.sleep(0.01)  # MLflow itself would only recognise the same millisecond
    tracker_of(uri, tracker.key).log_phase(1, metrics | {"b": 2.0})
    assert series(client, tracker.parent_run_id, "a") == [(1, 1.5)]
    assert series(client, tracker.parent_run_id, "count") == [(1, 3.0)]
    assert len(series(client, tracker.parent_run_id, "nan")) == 1
    assert len(series(client, tracker.parent_run_id, "inf")) == 1
    assert series(client, tracker.parent_run_id, "b") == [(1, 2.0)]
    tracker.log_phase(1, {"a": 1.25})
    assert series(client, tracker.parent_run_id, "a") == [(1, 1.5), (1, 1.25)]


def test_a_child_holds_metrics_and_curves(tracker, client):
    with tracker.child(2, "recover_train") as child:
        child.log_metrics({"tokens": 20480.0, "absent": None})
        child.log_series("loss", [(step, 3 - step / 1000) for step in range(1500)])
    (run,) = children(client, tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "02 recover_train · a run"
    assert (run.data.tags["adapt_pruner.phase"], run.data.tags["adapt_pruner.step"]) == ("2", "recover_train")
    assert series(client, run.info.run_id, "tokens") == [(0, 20480.0)]
    loss = series(client, run.info.run_id, "loss")
    assert [step for step, _ in loss] == list(range(1500))
    assert loss[1000][1] == 2.0


def test_a_retried_child_is_the_same_run(uri, tracker, client):
    def train():
        with tracker.child(1, "calibrate") as child:
            child.log_series("loss", [(0, 3.0), (1, 2.5)])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    assert [run.info.status for run in children(client, tracker)] == ["FAILED"]
    with tracker_of(uri, tracker.key).child(1, "calibrate") as again:
        again.log_series("loss", [(0, 3.0), (1, 2.5), (2, 2.25)])
    (run,) = children(client, tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_id == again.run_id
    assert series(client, run.info.run_id, "loss") == [(0, 3.0), (1, 2.5), (2, 2.25)]


def test_children_of_other_phases_steps_and_runs_are_other_runs(uri, tracker, client):
    ids = set()
    for phase, step in ((1, "calibrate"), (2, "calibrate"), (1, "evaluate")):
        with tracker.child(phase, step) as child:
            ids.add(child.run_id)
    with tracker_of(uri, "quite another key").child(1, "calibrate") as child:
        ids.add(child.run_id)
    assert len(ids) == 4
    assert len(children(client, tracker)) == 3


def test_ctrl_c_marks_the_child_as_killed(tracker, client):
    with pytest.raises(KeyboardInterrupt), tracker.child(1, "calibrate"):
        raise KeyboardInterrupt
    assert [run.info.status for run in children(client, tracker)] == ["KILLED"]


def test_the_run_of_kfp_s_own_plugin_is_used(uri, client, monkeypatch):
    experiment = client.create_experiment("made by kfp")
    pipeline = client.create_run(experiment).info.run_id
    for task in ("first", "second"):  # the plugin nests a run for every task
        nested = client.create_run(experiment, tags={"mlflow.parentRunId": pipeline}, run_name=task)
        monkeypatch.setenv("MLFLOW_RUN_ID", nested.info.run_id)
        tracker = tracker_of(uri, "kfp key")
        tracker.log_phase(1, {task: 1.0})
        assert tracker.parent_run_id == pipeline
    assert set(client.get_run(pipeline).data.metrics) == {"first", "second"}


def test_the_report_is_an_artifact_of_the_parent(tracker, client, tmp_path):
    (tmp_path / "report.html").write_text("<p>report")
    tracker.log_report(tmp_path / "report.html")
    assert [f.path for f in client.list_artifacts(tracker.parent_run_id)] == ["report.html"]


PROCESS = """
import sys, time
from pathlib import Path
from core.settings.storage import TrackingSettings
from core.tracking.mlflow import open_tracker
name = sys.argv[1]
settings = TrackingSettings(uri="sqlite:///new/folder/mlflow.db", experiment="two")
tracker = open_tracker(settings, key="shared", name="shared")
tracker.client  # both processes find no database yet
if name == "left":
    tracker.start({}, {})
    Path("started").touch()
while not Path("started").exists():
    time.sleep(0.01)
with tracker.child(1, name) as child:
    for phase in range(10):
        tracker.log_phase(phase, {name: phase * 1.5})
        child.log_metrics({"value": phase}, step=phase)
report = Path(f"{name}.html")
report.touch()
tracker.log_report(report)
report.unlink()
"""


@pytest.mark.slow
def test_two_processes_log_onto_one_parent_in_a_new_database_and_are_silent(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, name],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("left", "right")
    ]
    results = [(process.communicate(timeout=120)[0], process.returncode) for process in running]
    assert results == [("", 0), ("", 0)]

    tracker = tracker_of(f"sqlite:///{tmp_path}/new/folder/mlflow.db", "shared", experiment="two")
    client = tracker.client
    for name in ("left", "right"):
        assert series(client, tracker.parent_run_id, name) == [(phase, phase * 1.5) for phase in range(10)]
    assert {run.info.run_name for run in children(client, tracker)} == {
        "01 left · shared",
        "01 right · shared",
    }

    (tmp_path / "started").unlink()
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    artifacts = f"new/folder/mlflow-artifacts/two/{tracker.parent_run_id}/artifacts"
    reports = {f"{artifacts}/{name}.html" for name in ("left", "right")}
    assert files == {"new/folder/mlflow.db"} | reports  # no ./mlruns and no drafts


def test_a_database_that_another_process_made_meanwhile_is_kept(tmp_path, monkeypatch):
    path, link = tmp_path / "mlflow.db", os.link

    def link_too_late(draft, target):
        shutil.copy(draft, target)
        with sqlite3.connect(target) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        link(draft, target)

    monkeypatch.setattr(os, "link", link_too_late)
    tracker_of(f"sqlite:///{path}", "k").start({}, {})
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT * FROM theirs").fetchall() == []


def test_without_a_uri_everything_works_and_mlflow_is_not_imported(tmp_path):
    code = """
import sys
import threading
from pathlib import Path
from core.settings.storage import TrackingSettings
from core.tracking.mlflow import open_tracker
from core.tracking.registry import register
tracker = open_tracker(TrackingSettings(), key="k", name="n")
tracker.start({"a": 1}, {})
tracker.log_phase(0, {"perplexity": 1.0})
with tracker.child(1, "calibrate") as child:
    child.log_metrics({"x": 1.0}); child.log_series("y", [(0, 1.0)])
tracker.log_report(Path("none.html")); tracker.finish("FINISHED")
tracker.describe("x"); tracker.log_page("x", "x.html")
assert register(tracker, "m", "u", params={}, phase=1) == ""
assert tracker.parent_run_id == "" and tracker.uri == ""
assert "mlflow" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, check=True
    )
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_server_where_the_settings_do_not(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert open_tracker(TrackingSettings(), key="k", name="n").uri == uri
    assert open_tracker(TrackingSettings(uri="http://other"), key="k", name="n").uri == "http://other"


def test_an_unreachable_server_is_one_line_and_quick(caplog, capfd):
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(TrackingError) as caught:
        tracker_of("http://me:s3cret@127.0.0.1:9", "k").start({}, {})
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be reached" in message
    assert "tracking.uri" in message
    assert "s3cret" not in message
    assert time.monotonic() - start < 15
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_server_that_fails_is_not_called_unreachable():
    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(TrackingError) as caught:
            tracker_of(uri, "k").start({}, {})
        server.shutdown()
    assert str(caught.value).startswith(f"MLflow at {uri} answers with HTTP 500. Its log says why")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sqlite:///{tmp}/text.db", "not a database"),
        ("sqlite:////proc/nowhere/mlflow.db", "writable"),
        ("{tmp}/mlruns", "sqlite:///{tmp}/mlruns/mlflow.db"),
        ("foo://bar", "unsupported URI"),
    ],
)
def test_a_uri_that_cannot_be_used_is_one_line(name, text, tmp_path, capfd):
    (tmp_path / "text.db").write_text("a text that is no database")
    with pytest.raises(TrackingError) as caught:
        tracker_of(name.format(tmp=tmp_path), "k").start({}, {})
    assert text.format(tmp=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_deleted_experiment_says_what_to_do(uri, client):
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match=r"tracking\.experiment=gone is deleted"):
        tracker_of(uri, "k", experiment="gone").start({}, {})


def test_the_error_of_a_step_is_not_hidden_by_one_of_tracking(tracker, monkeypatch):
    def server_gone(*_):
        raise ConnectionError("server gone")

    monkeypatch.setattr(tracker.client, "set_terminated", server_gone)
    with pytest.raises(ValueError, match="the real one"), tracker.child(1, "calibrate"):
        raise ValueError("the real one")
