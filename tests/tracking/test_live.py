"""Curves in MLflow while a training goes on: in a database, on a real server, without an answer."""

import contextlib
import functools
import logging
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import core.steps.recover_train
from core.storage.publication import open_publication
from core.tracking.client import connect
from core.tracking.live import logging_live
from tests.support.servers import free_ports, mlflow_server
from tests.tracking.test_mlflow import (  # noqa: F401
    client,
    series,
    tracker,
    tracker_of,
)
from tests.training.test_training_kills import (  # noqa: F401
    TRAINING_STEPS,
    job_in,
    processes,
    pruned,
    recover_train,
    run_in_a_process,
)

QUICK_S = 0.02


def until(happened, limit_s=60.0):
    """Wait for something; return what is then true."""
    deadline = time.monotonic() + limit_s
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(QUICK_S)
    return found


def test_curves_are_there_while_they_grow_and_no_step_is_there_twice(tracker, client):  # noqa: F811
    rates = {"loss": [], "step_tokens_per_s": []}
    with contextlib.suppress(KeyboardInterrupt), tracker.child(1, "recover-train") as child:
        with logging_live(child.uri, child.run_id, lambda: rates, every_s=QUICK_S):
            for step in range(3):
                rates["loss"].append((step, 3.0 - step))
                rates["step_tokens_per_s"].append((step, 100.0))
                until(lambda: len(series(client, child.run_id, "loss")) == len(rates["loss"]))
            rates["loss"].append((3, 0.5))
        assert len(series(client, child.run_id, "loss")) == 4, "what came last is logged at the end"
        raise KeyboardInterrupt
    # The next attempt begins with a state of step 2, is faster, and takes 1,500 steps more.
    again = {
        "loss": [*((step, 3.0 - step) for step in range(2)), *((step, 0.5) for step in range(2, 1502))],
        "step_tokens_per_s": [(step, 200.0) for step in range(1502)],
    }
    with tracker_of(tracker.uri, tracker.key).child(1, "recover-train") as child:
        with logging_live(child.uri, child.run_id, lambda: again, every_s=60.0):
            pass
        for name, points in again.items():
            child.log_series(name, points)
    loss, rate = (series(client, child.run_id, name) for name in again)
    assert loss[:4] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
    assert [step for step, _ in loss] == [step for step, _ in rate] == list(range(1502))
    assert [value for _, value in rate] == [100.0] * 3 + [200.0] * 1499


def test_a_server_that_fails_is_warned_about_once_and_gets_each_step_once(
    tracker,  # noqa: F811
    client,  # noqa: F811
    monkeypatch,
    caplog,
):
    """Its reply to the second request is lost: the points have arrived."""
    log_batch, requests = type(client).log_batch, []

    def failing(self, *args, **kwargs):
        requests.append(len(kwargs["metrics"]))
        if len(requests) == 2:
            log_batch(self, *args, **kwargs)
        if 2 <= len(requests) <= 4:
            raise RuntimeError("http://me:s3cret@host does not answer")
        log_batch(self, *args, **kwargs)

    monkeypatch.setattr(type(client), "log_batch", failing)
    points = {"loss": [(0, 1.0)]}
    with tracker.child(1, "recover-train") as child, caplog.at_level(logging.WARNING):
        with logging_live(child.uri, child.run_id, lambda: points, every_s=QUICK_S):
            for step in range(1, 8):
                until(lambda: len(requests) >= len(points["loss"]))
                points["loss"].append((step, 1.0 - step))
        (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("training goes on, but its curves are not in MLflow until its end: MLflow at ")
    assert "s3cret" not in said
    assert [step for step, _ in series(client, child.run_id, "loss")] == list(range(8))


def test_a_server_that_is_gone_takes_no_time_of_what_goes_on(caplog, monkeypatch):
    """Also not at the end, where it has been asked in vain before."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    with logging_live("http://me:s3cret@127.0.0.1:9", "run", lambda: {"loss": [(0, 1.0)]}, every_s=QUICK_S):
        assert time.monotonic() - started < 0.5
        until(lambda: caplog.records)
        started = time.monotonic()
    assert time.monotonic() - started < 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert "127.0.0.1:9 cannot be reached" in said
    assert "s3cret" not in said


def recover_train_until(job, waits_at, go_on):
    """Run recover-train; at that forward pass it waits for the file ``go_on``."""
    step, passes = core.steps.recover_train, []

    def wait(module, _):
        if type(module).__name__ == "LlamaForCausalLM" and module.training:
            passes.append(1)
            while len(passes) == waits_at and not go_on.exists():
                time.sleep(QUICK_S)

    step.logging_live = functools.partial(logging_live, every_s=0.2)
    torch.nn.modules.module.register_module_forward_pre_hook(wait)
    recover_train(job)


@pytest.mark.slow
def test_killed_resumed_and_left_by_its_server_a_training_has_each_step_once(processes, job_in, tmp_path):  # noqa: F811
    job, folder, (port,) = job_in(str(tmp_path / "store")), tmp_path / "mlflow", free_ports(1)
    connect(f"sqlite:///{folder}/server.db")  # makes it faster than a server does
    address = f"http://127.0.0.1:{port}"
    job["environment"]["MLFLOW_TRACKING_URI"] = address
    client, go_on = MlflowClient(address), tmp_path / "go-on"  # noqa: F811

    def started(waits_at):
        process = processes.Process(target=recover_train_until, args=(job, waits_at, go_on))
        process.start()
        return process

    def of_the_step(name="loss"):
        experiment = client.get_experiment_by_name("adapt-pruner")
        found = client.search_runs([experiment.experiment_id]) if experiment else []
        runs = [run for run in found if run.data.tags.get("adapt_pruner.step") == "recover-train"]
        assert len(runs) <= 1, "an attempt finds the run of the one before"
        return runs and series(client, runs[0].info.run_id, name)

    with mlflow_server(folder, port):
        process = started(17)  # two a step, and those that its memory is planned by
        before = until(lambda: len(of_the_step()) >= 6 and len(of_the_step()), 300.0)
        process.kill()
        process.join()
        process = started(9)
        until(lambda: len(of_the_step()) > before, 300.0)
    go_on.touch()
    process.join(120)
    assert process.exitcode == 1, "what it has published is not logged"
    assert "training goes on, but its curves" in Path(job["log"]).read_text()
    with mlflow_server(folder, port):
        run_in_a_process(processes, job)
        report = open_publication(job["uri"]).read_json("report.json")
        assert len(report["losses"]) == TRAINING_STEPS
        assert of_the_step() == [(step, loss) for step, loss, _ in report["losses"]]
        for name, points in report["series"].items():
            assert [step for step, _ in of_the_step(name)] == [step for step, _ in points], name
