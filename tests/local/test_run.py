"""A whole run of a tiny model through the command line.

Its store is on a real S3 server and MLflow on SQLite. It is killed on the way and started again, and compared
with a run whose steps are called in this process, in a folder.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from pathlib import Path

import boto3
import pytest
import torch

from core.model.build import load_model, load_tokenizer
from core.runs.run import Run
from core.storage.publication import open_publication
from tests.support.project import (
    CHANNEL_PARAMS,
    MEASURED,
    STEPS,
    command_line,
    kept_groups,
    recipe_with,
    run_all,
)
from tests.support.servers import BUCKET, killed_at_the_end

pytestmark = pytest.mark.slow

PHASE_STEPS = ("calibrate", "score-layers", "prune-step", "recover-train", "evaluate")
PUBLISHED = ("calibrated", "scored", "pruned", "recovered", "evaluated")
KILLED_IN = "phase 2 recover-train"
PATIENCE_S = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the run of this module is stored, tracked and reported."""

    store: str
    tracking: str
    output: Path

    def objects(self):
        """Return (ETag, time of writing) of every object in the store."""
        prefix = self.store.removeprefix(f"s3://{BUCKET}/")
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {
            item["Key"].removeprefix(f"{prefix}/"): (item["ETag"], item["LastModified"])
            for page in pages
            for item in page.get("Contents", ())
        }

    def run_arguments(self):
        settings = {"storage.store": self.store, "tracking.uri": self.tracking, "tracking.model_name": "tiny"}
        options = [f"--set={name}={value}" for name, value in settings.items()]
        return ["run", "recipe.yaml", *options, "--output", self.output]

    @contextlib.contextmanager
    def started(self, project, *arguments):
        """Run ``adapt-pruner`` with the store's credentials; at the end all its processes get SIGKILL."""
        command, environment = command_line(*arguments)
        environment |= {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes)
        with killed_at_the_end(process):
            yield process

    def call(self, project, *arguments):
        with self.started(project, *arguments) as process:
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def log(self):
        path = self.output / "run.log"
        return path.read_text() if path.exists() else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """What one call of the command has left."""

    status: int
    stdout: str
    stderr: str
    log: str
    objects: dict

    @property
    def key(self):
        (key,) = {name.split("/")[1] for name in self.objects if name.startswith("runs/")}
        return key

    def said(self, message):
        """Return the tasks, as their log lines name them, that have logged ``message``."""
        return re.findall(rf"^ *\d\d:\d\d:\d\d INFO (.*): {message}$", self.log, re.MULTILINE)


@pytest.fixture(scope="module")
def place(s3_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
            patch.delenv(name)
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        yield Place(
            store=f"s3://{BUCKET}/{uuid.uuid4().hex}",
            tracking=f"sqlite:///{folder}/mlflow.db",
            output=folder / "output",
        )


@pytest.fixture(scope="module")
def killed(place, project):
    """A run that gets SIGKILL, with all its processes, while phase 2 trains."""
    deadline = time.monotonic() + PATIENCE_S
    with place.started(project, *place.run_arguments()) as process:
        while f"INFO {KILLED_IN}: started" not in place.log():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, place.log()
            time.sleep(0.05)
    return Execution(
        status=process.returncode, stdout="", stderr="", log=place.log(), objects=place.objects()
    )


def execute(place, project):
    done = place.call(project, *place.run_arguments())
    return Execution(
        status=done.returncode,
        stdout=done.stdout,
        stderr=done.stderr,
        log=place.log(),
        objects=place.objects(),
    )


@pytest.fixture(scope="module")
def finished(place, project, killed):
    """The same command once more: the run ends."""
    execution = execute(place, project)
    assert execution.status == 0, execution.stderr
    return execution


@pytest.fixture(scope="module")
def checkpoint(place, finished, tmp_path_factory):
    """The final checkpoint, fetched from the S3 server."""
    return open_publication(f"{place.store}/runs/{finished.key}/final").fetch(
        tmp_path_factory.mktemp("final")
    )


@pytest.fixture(scope="module")
def record(checkpoint):
    return json.loads((checkpoint / "record.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The same recipe, step by step in this process, in a folder that keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = recipe_with({"storage.store": str(folder / "store"), "storage.keep": "all"})
    with contextlib.chdir(project):
        handle, final = run_all(recipe, folder)
    return Run.load(handle), Path(final)


def published_key(phase, step):
    return f"phases/{phase:02d}/{step}/MANIFEST.json"


def test_a_killed_run_goes_on_where_it_was_killed(place, killed, finished):
    run = f"runs/{finished.key}"
    assert killed.status == -signal.SIGKILL
    assert f"{run}/{published_key(2, 'pruned')}" in killed.objects
    assert f"{run}/{published_key(2, 'recovered')}" not in killed.objects
    assert f"{run}/_lease/0001.json" in killed.objects  # still young when the same command came again
    found = {"prepare-data", "phase 0 evaluate", *(f"phase 1 {step}" for step in PHASE_STEPS)}
    found |= {f"phase 2 {step}" for step in PHASE_STEPS[:3]}
    assert set(finished.said("already done")) == found
    computed = {"resolve-base", "needs-run", KILLED_IN, "phase 2 evaluate", "publish", "finalize"}
    assert sorted(finished.said("started")) == sorted(found | computed)
    assert f"; {len(found)} steps were already done" in finished.stdout
    for name, written in killed.objects.items():
        if name in finished.objects and not name.endswith("run.json"):
            assert finished.objects[name] == written, name


def test_a_killed_run_ends_at_the_same_bits_as_an_undisturbed_one_in_another_store(
    place, finished, checkpoint, undisturbed
):
    run, folder = undisturbed
    assert run.key == finished.key
    timed = {"record.json", "report.html", "report.json", "MANIFEST.json"}
    names = {path.name for path in folder.iterdir()} - timed
    assert {"config.json", "tokenizer.json", "adapt_pruner.json", "model-00001-of-00004.safetensors"} <= names
    assert names == {path.name for path in checkpoint.iterdir()} - timed
    for name in names:
        assert (checkpoint / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_final_checkpoint_has_the_size_that_was_asked_for_and_generates(project, checkpoint, record):
    base, model = load_model(project / "base"), load_model(checkpoint)
    dense, params = (sum(p.numel() for p in network.parameters()) for network in (base, model))
    assert abs(params - 0.75 * dense) <= CHANNEL_PARAMS / 2
    assert record["phases"][-1]["params"] == params
    tokenizer = load_tokenizer(checkpoint)
    prompt = tokenizer("The class statement", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens = prompt["input_ids"]
    for _ in range(8):  # the same without a cache
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert answer.tolist() == tokens.tolist()


def test_the_command_that_the_run_ends_with_lets_the_model_talk_from_the_store(
    place, project, finished, checkpoint
):
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("try it")]
    program, *arguments = shlex.split(line.removeprefix("try it"))
    assert (program, arguments[:2]) == (
        "adapt-pruner",
        ["generate", f"{place.store}/runs/{finished.key}/final"],
    )
    done = place.call(project, *arguments, "--max-new-tokens", 8)
    assert (done.returncode, done.stderr) == (0, "")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    prompt = tokenizer(arguments[2], return_tensors="pt")
    (answer,) = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(answer[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.stdout.strip() == text.strip()


def test_every_step_has_published_and_only_the_final_checkpoint_is_kept(place, finished):
    run, names = f"runs/{finished.key}", set(finished.objects)
    steps = [(0, "evaluated"), *((phase, step) for phase in (1, 2) for step in PUBLISHED)]
    folders = {"evaluated": f"evaluated-{MEASURED}"}
    places = {f"phases/{phase:02d}/{folders.get(step, step)}": step for phase, step in steps}
    places |= {name: name for name in ("data", "final", f"held-out-{MEASURED}")}
    for folder, step in places.items():
        manifest = open_publication(f"{place.store}/{run}/{folder}").manifest
        files = {f"{run}/{folder}/{manifest.key(entry)}" for entry in manifest.files}
        assert files
        if step in ("pruned", "recovered"):
            assert files & names == {f"{run}/{folder}/report.json"}
        else:
            assert files <= names
        names -= files | {f"{run}/{folder}/MANIFEST.json"}
    assert {name for name in names if name.startswith("runs/")} == {f"{run}/run.json", f"{run}/DONE.json"}


def test_the_record_tells_all_of_every_phase(place, finished, record, checkpoint, undisturbed):
    run, _ = undisturbed
    dense, *phases = record["phases"]
    assert [phase["phase"] for phase in record["phases"]] == [0, 1, 2]
    assert [phase["target_params"] for phase in phases] == list(run.phase_params)
    assert dense["params"] == dense["target_params"] == run.dense.num_params()
    assert {(layer["query_heads"], layer["kv_heads"], layer["mlp_width"]) for layer in dense["layers"]} == {
        (6, 3, 40)
    }
    for number, phase in enumerate(phases, start=1):
        assert abs(phase["params"] - phase["target_params"]) <= CHANNEL_PARAMS / 2
        assert len(phase["layers"]) == len(phase["importance"]) == len(phase["sparsity"]) == 3
        assert set(phase["seconds"]) == set(PUBLISHED)
        before, after = (run.phase_uri(number, step) for step in ("pruned", "recovered"))
        assert phase["perplexity_pruned"] == pytest.approx(perplexity(run, before), rel=1e-5)
        assert phase["perplexity"] == pytest.approx(perplexity(run, after), rel=1e-5)
        assert phase["perplexity"] < phase["perplexity_pruned"]
    assert dense["perplexity"] == pytest.approx(perplexity(run, run.base_uri), rel=1e-5)
    shapes = [(len(q), len(k), len(m)) for q, k, m in kept_groups(run, 2)]
    assert [tuple(layer.values()) for layer in phases[1]["layers"]] == shapes
    losses = [point for phase in phases for point in phase["losses"]]
    assert [step for step, _, _ in losses] == list(range(STEPS))
    # warm-up over 1 step, decay over the last 2 of 5
    assert [rate for _, _, rate in losses] == pytest.approx([0.01, 0.01, 0.01, 0.0055, 0.001])
    assert [phase["tokens"] for phase in record["phases"]] == [0, 192, 768]
    assert (record["key"], record["name"], record["base"]) == (finished.key, "trial", "base")
    assert record["settings"]["prune"]["target"] == "75%"
    assert record["checkpoint_uri"] == f"{place.store}/runs/{finished.key}/final"
    assert record["tracking_uri"] == place.tracking


def perplexity(run, checkpoint_uri):
    """Perplexity of a published checkpoint by the model's own loss, a window at a time."""
    from safetensors.torch import load_file

    windows = load_file(Path(run.held_out_uri(), "perplexity.safetensors"))["input_ids"].long()
    model = load_model(Path(checkpoint_uri))
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def test_the_report_and_the_table_are_shown(place, finished, record, checkpoint):
    report = (place.output / "report.html").read_text()
    assert report == (checkpoint / "report.html").read_text()
    assert "<svg" in report
    rows = [line.split() for line in finished.stdout.splitlines()]
    for name, phase in zip(("dense", "1", "2"), record["phases"], strict=True):
        (row,) = [row for row in rows if row[:1] == [name]]
        assert row[1] == f"{phase['params']:,}"
    assert "Traceback" not in finished.stderr
    assert not (place.output / "kfp").exists()


def test_mlflow_holds_the_run_and_a_child_for_every_step(place, finished, record):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=place.tracking)
    experiment = client.get_experiment_by_name("adapt-pruner").experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (parent.info.run_name, parent.info.status) == (
        "base → 75 % adapt-pruner (trial, seed 7)",
        "FINISHED",
    )
    assert parent.info.run_id == record["tracking_run"]
    assert parent.data.tags["adapt_pruner.revision"] == record["revision"]
    for name in ("seed", "prune.target", "prune.phases", "training.learning_rate", "calibration.sequences"):
        value = record["settings"]
        for part in name.split("."):
            value = value[part]
        assert parent.data.params[name] == str(value)

    def series(run, metric):
        points = client.get_metric_history(run.info.run_id, metric)
        assert len({point.step for point in points}) == len(points), metric
        return {point.step: point.value for point in points}

    phases = record["phases"]
    for metric in ("params", "perplexity", "perplexity_pruned", "tokens"):
        expected = {p["phase"]: p[metric] for p in phases if p[metric] is not None}
        assert series(parent, metric) == pytest.approx(expected), metric
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["phases", "report.html"]
    pages = [file.path for file in client.list_artifacts(parent.info.run_id, "phases")]
    assert pages == [f"phases/{phase:02d}.html" for phase in range(len(phases))]

    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    assert {run.info.status for run in children} == {"FINISHED"}
    names = [
        (run.data.tags.get("adapt_pruner.phase"), run.data.tags["adapt_pruner.step"]) for run in children
    ]
    steps = [(str(phase), step) for phase in (1, 2) for step in PHASE_STEPS]
    once = [("0", "hold-out"), ("0", "prepare-data"), ("0", "evaluate"), ("2", "publish")]
    assert sorted(names, key=str) == sorted(steps + once, key=str)
    by_name = dict(zip(names, children, strict=True))
    for phase in (1, 2):
        losses = {step: loss for step, loss, _ in phases[phase]["losses"]}
        assert series(by_name[str(phase), "recover-train"], "loss") == pytest.approx(losses)
        importance = dict(enumerate(phases[phase]["importance"]))
        assert series(by_name[str(phase), "score-layers"], "importance") == pytest.approx(importance)

    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.source == version.tags["checkpoint_uri"] == record["checkpoint_uri"]
    assert client.get_model_version_by_alias("tiny", "candidate").version == version.version


def test_a_finished_run_computes_nothing_again(place, project, finished):
    again = execute(place, project)
    assert again.status == 0, again.stderr
    assert again.said("started") == ["resolve-base", "needs-run", "finalize"]
    assert "All steps were already done: nothing computed" in again.stdout
    assert again.stdout.splitlines()[:9] == finished.stdout.splitlines()[:9]  # the table
    assert again.objects == finished.objects
