"""An experiment as runs on Kubeflow Pipelines: few at a time, found again, and none stops the others."""

import json

import pytest
import yaml
from click.testing import CliRunner

from core.experiments.definition import load_experiment
from core.settings.methods import OF_THE_MODEL
from core.settings.parameters import settings_of_run
from pipelines.cli import main
from tests.support.argo import task
from tests.support.ir import gpus
from tests.support.kfp_api import Refused, frame

FILE = {
    "title": "Seeds and sizes",
    "recipe": "trial.yaml",
    "seeds": 2,
    "axes": {"removed": {"20 %": {"prune.target": "80%"}, "40 %": {"prune.target": "60%"}}},
    "metrics": ["params"],
}
LOST = [
    frame("RUNNING", task("recover-train", "Running", ago=5)),
    frame("FAILED", task("recover-train", "Failed", message="error: the loss is not finite", ago=5)),
]


@pytest.fixture
def path(recipe, tmp_path):
    return write(tmp_path)


def write(folder, **changes):
    path = folder / "sizes.yaml"
    path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
    return path


def submit(api, path, *arguments):
    """Submit with a store that is a volume of the cluster, which is not mounted here."""
    place = ["--host", api.endpoint, "--set=storage.store=file:///nowhere/store", "--every", "0.01s"]
    return CliRunner().invoke(main, ["experiment", str(path), "--submit", *place, *map(str, arguments)])


def unfinished(api):
    return sum(run["state"] not in ("SUCCEEDED", "FAILED") for run in api.runs.values())


def test_each_cell_is_a_run_with_its_settings_and_few_versions_serve_all(api, path):
    submit(api, path)
    cells = load_experiment(path, ["storage.store=file:///nowhere/store"]).cells
    runs = {run["display_name"]: run for run in api.runs.values()}
    assert set(runs) == {cell.key for cell in cells}
    for cell in cells:
        parameters = runs[cell.key]["runtime_config"]["parameters"]
        assert parameters["target"] == cell.settings.prune.target
        compiled = {"prune": {"phases": 1}}
        found = settings_of_run(json.loads(json.dumps(parameters)), compiled)
        assert (found.digest(), found.seed, found.storage) == (
            cell.settings.digest(),
            cell.settings.seed,
            cell.settings.storage,
        )
    assert len(api.versions) == len(api.uploads) == 1
    assert [each["display_name"] for each in api.experiments.values()] == ["sizes"]


def test_only_methods_whose_tasks_get_the_same_gpus_share_a_version(api, recipe, tmp_path):
    methods = ("minitron", "magnitude", "sheared-llama", "minitron-depth")
    axes = {"method": {method: {"prune.method": method} for method in methods}}
    one_step = ["--set=prune.steps_per_phase=1", "--seeds", 1]
    submit(api, write(tmp_path, axes=axes), *one_step)
    versions = {}
    for run in api.runs.values():
        version = run["pipeline_version_reference"]["pipeline_version_id"]
        method = run["runtime_config"]["parameters"]["method"]
        versions.setdefault(version, set()).add(method)
        assert ("exec-score-layers" in gpus(api.spec(version))) == (method in OF_THE_MODEL)
    assert len(versions) == len(api.uploads) == 2
    assert {frozenset(shared) for shared in versions.values()} == {
        frozenset(methods[:2]),
        frozenset(methods[2:]),
    }


def test_a_pause_of_nothing_is_refused_before_anything_is_started(api, path):
    command = ["experiment", str(path), "--submit", "--host", api.endpoint, "--every", "0"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "error: --every=0 leaves no pause between requests. Give a time such as 10s." in result.stderr
    assert api.requests == []


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_runs_than_asked_for_are_unfinished_at_a_time(api, path, parallel):
    seen = []
    api.hook = lambda request: seen.append(unfinished(api) + 1) if request == "POST /runs" else None
    api.frames = [frame("PENDING")] * 3 + [frame("RUNNING")] * 3 + [frame("SUCCEEDED")]
    submit(api, path, "--parallel", parallel)
    assert len(api.runs) == 4
    assert max(seen) == parallel
    assert unfinished(api) == 0


def test_a_repeated_command_finds_its_runs_and_starts_the_others(api, path):
    """The first command ends in the middle; its runs stay, and count towards the limit."""

    def refuse(request):
        if request.startswith("GET /runs/") and len(api.runs) == 2:
            raise Refused(401, "", body=b"Jwt is expired")

    api.frames = [frame("RUNNING")] * 4 + [frame("SUCCEEDED")]
    api.hook = refuse
    first = submit(api, path, "--parallel", 2)
    assert first.exit_code == 1
    assert "refuses the login" in first.stderr
    started = set(api.runs)
    assert len(started) == 2
    seen = []
    api.hook = lambda request: seen.append(unfinished(api) + 1) if request == "POST /runs" else None
    again = submit(api, path, "--parallel", 2)
    assert again.stderr.count(": found ") == 2
    assert started < set(api.runs)
    assert len(api.runs) == 4
    assert max(seen) == 2
    assert submit(api, path).stderr.count(": found ") == 4
    assert len(api.runs) == 4


def test_a_run_that_fails_is_reported_and_started_again_by_the_next_command(api, path):
    api.frames = LOST
    result = submit(api, path, "--only", "removed=20 %", "--seeds", 1)
    assert (
        "removed 20 %, seed 0: failed: phase 1 recover-train failed: the loss is not finite." in result.stderr
    )
    api.frames = [frame("SUCCEEDED")]
    result = submit(api, path)
    assert result.stderr.count("succeeded") == 4
    assert len(api.runs) == 5


@pytest.mark.slow
def test_what_a_cluster_cannot_hold_is_reported_and_the_rest_runs(api, recipe, tmp_path):
    axes = {"N_P": {"1": {"prune.phases": 1}, "500": {"prune.phases": 500}}}
    result = submit(api, write(tmp_path, axes=axes, seeds=1))
    assert [run["state"] for run in api.runs.values()] == ["SUCCEEDED"]
    assert "N_P 500, seed 0: prune.phases=500 exceeds" in result.stderr


def test_a_store_of_this_machine_is_refused_before_anything_is_asked(api, path):
    command = ["experiment", str(path), "--submit", "--host", api.endpoint, "--set=storage.store=here"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: storage.store=here is a folder of this machine")
    assert api.requests == []


def test_what_is_done_in_the_store_is_not_submitted(api, folder, monkeypatch):
    from tests.support.project import run_all, write_recipe

    store = (folder / "store").as_uri()
    write_recipe(folder / "trial.yaml", {"prune.phases": 1, "training.tokens": 0, "storage.store": store})
    path = write(folder, axes={"removed": {"25 %": {"prune.target": "75%"}}})
    cells = load_experiment(path).cells
    run_all(cells[0].settings.to_dict(), folder / "artifacts")
    command = ["experiment", str(path), "--submit", "--host", api.endpoint, "--every", "0.01s"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "2 runs, of which 1 are done" in result.stderr
    assert [run["display_name"] for run in api.runs.values()] == [cells[1].key]
    assert f"{cells[1].name}: not started" in result.stdout  # the stand-in computes nothing
