"""What README says to type does what it says, on a tiny project in the demo's place."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT, command_line, write_recipe
from tests.support.servers import answering, free_ports

README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.strip().splitlines()
]


def test_every_command_is_of_a_kind_that_is_tried():
    assert {command.split()[0] for command in COMMANDS} == {"make", "adapt-pruner", "mlflow", "docker"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_the_target(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def demo(project, tmp_path_factory):
    """A folder in which recipes/demo.yaml has been run, as ``make demo`` does."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    shutil.copytree(project, folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    changes = {
        "name": "demo",
        "storage.store": "output/demo/store",
        "tracking.uri": "sqlite:///output/demo/mlflow.db",
        "prune.phases": 1,
    }
    write_recipe(folder / "recipes" / "demo.yaml", changes)
    return folder, run(folder, "adapt-pruner run recipes/demo.yaml")


def run(folder, command):
    line, environment = command_line(*shlex.split(command)[1:])
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_ends_with_what_the_readme_promises(demo):
    folder, shown = demo
    for command in ("mlflow ui --backend-store-uri", "adapt-pruner generate output/demo/model"):
        assert command in shown
    assert "output/demo/report.html" in shown
    assert (folder / "output/demo/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("adapt-pruner") and "--output output/larger" not in c]
)
def test_commands_on_the_demo_work(demo, command):
    folder, _ = demo
    shown = run(folder, command)
    assert shown.strip()


@pytest.mark.slow
def test_what_is_compiled_for_a_cluster_names_no_place_of_this_machine(demo):
    """A recipe whose base or texts lie here cannot run there, nor one that is tracked in a file."""
    folder, _ = demo
    (command,) = [c for c in COMMANDS if c.startswith("adapt-pruner compile")]
    line, environment = command_line(*shlex.split(command)[1:])
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    (hint,) = done.stderr.splitlines()
    assert hint.startswith(
        "hint: cluster.image=REGISTRY/adapt-pruner-python:0.1.0 is a tag, which may change"
    )


def test_overrides_of_the_run_command_are_settings():
    (command,) = [c for c in COMMANDS if "--output output/larger" in c]
    from core.settings.recipe import load_recipe

    words = shlex.split(command)
    overrides = tuple(value for flag, value in itertools.pairwise(words) if flag == "--set")
    assert load_recipe(ROOT / "recipes/demo.yaml", overrides).prune.target == "120M"


@pytest.mark.slow
def test_the_mlflow_command_shows_the_run(demo):
    folder, _ = demo
    (command,) = [c for c in COMMANDS if c.startswith("mlflow")]
    (port,) = free_ports(1)
    line = [str(Path(sys.executable).parent / "mlflow"), *shlex.split(command)[1:]]
    line += ["--port", str(port), "--workers", "1"]
    with answering(line, f"http://127.0.0.1:{port}/health", folder) as page:
        assert page == b"OK"


@pytest.mark.slow
def test_the_python_example_loads_the_model(demo, monkeypatch):
    folder, _ = demo
    (example,) = re.findall(r"```python\n(.*?)```", MODELS, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(example, names)
    assert names["model"].num_parameters() > 0
    assert len(names["tokenizer"]) == names["model"].config.vocab_size


@pytest.mark.slow
def test_what_comes_out_is_there(demo):
    folder, _ = demo
    named = re.findall(r"^\| `(output/demo/[\w./]+)` \|", README, re.MULTILINE)
    assert len(named) > 3
    assert not [name for name in named if not (folder / name).exists()]


def test_the_tree_names_what_is_there():
    (tree,) = re.findall(r"\n```\n(components/.*?)```", README, re.DOTALL)
    folders = [line.split()[0] for line in tree.splitlines()]
    assert len(folders) > 5
    assert not [name for name in folders if not (ROOT / name).is_dir()]
