"""MLflow is away at every request of a run."""

import contextlib
import logging
import re

from core.errors import TrackingError
from core.tracking.client import connect
from tests.support.evidence import note
from tests.support.project import recipe_with, run_all

MACHINE = {"seconds", "tokens_per_s", "repair_s", "distill_s", "mask_s"}
MACHINE |= {"step_tokens_per_s", "model_flops_per_s", "peak_memory_bytes", "time_left_s"}
"""What depends on the machine and its other work."""


def logged(uri):
    """Return every MLflow run's status, curves (less those of ``MACHINE``) and files, by phase and step."""
    client, found = connect(uri), {}
    experiment = client.get_experiment_by_name("adapt-pruner").experiment_id
    for run in client.search_runs([experiment], max_results=1000):
        names = set(run.data.metrics) - MACHINE
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        curves = {name: [(point.step, point.value) for point in curve] for name, curve in histories.items()}
        files = [file.path for file in client.list_artifacts(run.info.run_id)]
        which = tuple(run.data.tags.get(f"adapt_pruner.{tag}") for tag in ("phase", "step"))
        found[which] = (run.info.status, curves, files)
    return found


def test_an_outage_of_mlflow_costs_no_result_and_no_figure(project, tmp_path, monkeypatch, caplog):
    """Each kind of request fails the first time for a run, which is left as a kill would leave it."""
    from mlflow import MlflowClient

    monkeypatch.chdir(project)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def recipe(name):
        places = {"storage.store": str(tmp_path / name), "tracking.uri": f"sqlite:///{tmp_path}/{name}.db"}
        return recipe_with({"prune.phases": 1, **places})

    run_all(recipe("expected"), tmp_path / "artifacts")
    failed = set()

    def failing(name):
        real = getattr(MlflowClient, name)

        def fails_once(client, run_id, *arguments, **named):
            if arguments == ("FAILED",):
                raise ConnectionError("Connection refused")
            if (name, run_id) not in failed:
                failed.add((name, run_id))
                raise ConnectionError("Connection refused")
            return real(client, run_id, *arguments, **named)

        return fails_once

    for name in ("log_batch", "log_artifact", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, failing(name))
    caplog.set_level(logging.DEBUG, logger="core.steps.frame")
    ended, tries = False, 0
    while not ended:
        tries += 1
        with contextlib.suppress(TrackingError):
            run_all(recipe("outage"), tmp_path / "artifacts")
            ended = True
    computed = re.findall(r"computing \S+/runs/[0-9a-f]+/(\S+)", caplog.text)
    steps = [f"phases/01/{step}" for step in ("calibrated", "scored", "pruned", "recovered", "evaluated")]
    computed = [re.sub("-[0-9a-f]{8}$", "", place) for place in computed]
    assert computed == ["held-out", "data", "phases/00/evaluated", *steps, "final"]
    assert tries > 2 * len(computed)
    assert logged(f"sqlite:///{tmp_path}/outage.db") == logged(f"sqlite:///{tmp_path}/expected.db")
    curves = logged(f"sqlite:///{tmp_path}/outage.db")
    assert {"similarity", "calibration_loss"} <= curves["1", "calibrate"][1].keys()
    assert {"importance", "sparsity", "attention_removed"} <= curves["1", "score-layers"][1].keys()
    assert {"loss", "learning_rate", "tokens"} <= curves["1", "recover-train"][1].keys()
    assert {status for status, *_ in curves.values()} == {"FINISHED"}
    note(
        "Kills", "MLflow is away at the end of each step", "nothing is computed again; all figures are logged"
    )
