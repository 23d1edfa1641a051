"""The command line: answers at once, checks before it starts, one line an error."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from pipelines.cli import main
from tests.support.project import ROOT, call

COMMANDS = (
    "run",
    "compile",
    "doctor",
    "submit",
    "schedule",
    "experiment",
    "inspect",
    "evaluate",
    "benchmark",
    "sensitivity",
    "generate",
    "export",
    "push",
    "promote",
    "runs",
    "watch",
    "report",
    "compare",
    "clean",
)
RECIPE = {
    "name": "trial",
    "model": {"base": "./no-such-folder"},
    "prune": {"target": "50%", "phases": 2},
    "calibration": {"source": {"path": "calibration.txt"}},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(RECIPE))
    return "trial.yaml"


def entry_point(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-c",
        "from pipelines.cli import main; main(prog_name='adapt-pruner')",
        *arguments,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from pipelines.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {
        "torch",
        "transformers",
        "kfp",
        "datasets",
        "mlflow",
        "lm_eval",
        "matplotlib",
        "numpy",
        "boto3",
        "yaml",
        "rich",
    }
    assert "Usage:" in result.stdout
    assert not heavy & set(result.stderr.split())


def test_help_lists_every_command_under_a_topic():
    shown = call("--help").stdout.partition("\nRun a recipe:\n")[2]
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", shown, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS) == sorted(main.commands)
    assert "..." not in shown, "each first sentence fits"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command):
    result = call(command, "--help")
    assert f"Example:\n    adapt-pruner {command} " in result.output


def test_compile_writes_the_pipeline(recipe, tmp_path):
    result = call("compile", recipe, "-o", "out/pipeline.yaml", "--set", "prune.phases=3")
    assert result.exit_code == 0
    assert result.stdout.startswith("out/pipeline.yaml: 3 phases, ")
    assert "hint: storage.store=output/store is a folder of this machine" in result.stderr
    (document, _) = yaml.safe_load_all((tmp_path / "out" / "pipeline.yaml").read_text())
    assert document["pipelineInfo"]["name"] == "adapt-pruner"
    dags = [component["dag"] for component in document["components"].values() if "dag" in component]
    used = [task["componentRef"]["name"] for dag in dags for task in dag["tasks"].values()]
    assert used.count("comp-phase") == 3 + 2, "and those that may be left of a run that goes on"


@pytest.mark.parametrize("command", [["run"], ["compile", "-o", "p.yaml"]], ids=lambda command: command[0])
def test_all_wrong_settings_are_listed_before_anything_starts(command, recipe, tmp_path):
    name, *options = command
    result = call(
        name, recipe, *options, "--set", "prune.amplitud=1", "--set", "prune.phases=0", "--set", "seed=x"
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sorted(result.stderr.splitlines()) == [
        "error: prune.amplitud is not a setting. Did you mean prune.amplitude?",
        "error: prune.phases=0 must lie between 1 and 1,000. Change it.",
        "error: seed='x' must be of type int.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["trial.yaml"]


def test_a_missing_recipe_is_named():
    result = call("run", "no.yaml")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "recipe no.yaml cannot be read (No such file or directory)" in result.stderr


@pytest.mark.slow
def test_more_phases_than_a_cluster_holds_compile_to_an_error(recipe):
    result = call("compile", recipe, "-o", "p.yaml", "--set", "prune.phases=200")
    assert result.exit_code == 2
    assert re.match(r"error: prune\.phases=200 exceeds \d\d: ", result.stderr)


def test_compile_names_a_file_that_cannot_be_written(recipe):
    for output, problem in (("trial.yaml/p.yaml", "cannot be written"), ("p.txt", "must end in .yaml")):
        result = call("compile", recipe, "-o", output)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert f"--output={output} {problem}" in result.stderr


def test_run_checks_that_it_can_write_before_it_starts(recipe, tmp_path):
    result = call("run", recipe, "--output", "trial.yaml/out", "--set", "storage.store=trial.yaml/store")
    assert result.exit_code == 2
    problem = "cannot be written (Not a directory). Give a folder that you may write to."
    assert result.stderr.splitlines() == [
        f"error: --output=trial.yaml/out {problem}",
        f"error: storage.store={tmp_path}/trial.yaml/store {problem}",
    ]


def test_run_refuses_a_store_of_an_unknown_kind(recipe):
    result = call("run", recipe, "--set", "storage.store=gs://bucket")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: storage.store: gs://bucket is not a store.")


def test_run_names_the_task_that_failed_and_how_to_go_on(recipe, tmp_path):
    result = entry_point("run", str(tmp_path / recipe), "--output", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: resolve-base failed: ")
    assert "./no-such-folder" in last
    assert (
        f"The same command resumes after the last finished step; all output is in {tmp_path}/out/run.log."
        in last
    )
    assert "Traceback" not in result.stderr
