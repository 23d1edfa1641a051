"""A recipe that can be submitted, and the command that submits it, called in this process."""

import functools
import json
import os
import re

import yaml
from click.testing import CliRunner

from core.settings.recipe import settings_from_dict
from pipelines.cli import main
from pipelines.remote.submission import compile_package
from tests.support.argo import task

RECIPE = {
    "name": "Trial run",
    "model": {"base": "organisation/model"},
    "prune": {"target": "50%", "phases": 1},
    "calibration": {"source": {"path": "organisation/texts"}},
    "storage": {"store": "s3://models/pruning"},
    "cluster": {"image": "registry.example/adapt-pruner-python@sha256:" + "0" * 64},
}
NO_QUOTA_LEFT = (
    'pods "adapt-pruner-x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: '
    "8, limited: 8"
)


@functools.cache
def _package(settings):
    return compile_package(settings_from_dict(json.loads(settings)))


def forget_kfp(monkeypatch):
    """Take away what this machine says of a cluster; compile equal settings once a process."""
    monkeypatch.setattr(
        "pipelines.remote.submission.compile_package",
        lambda settings: _package(json.dumps(settings.to_dict())),
    )
    for name in [name for name in os.environ if name.startswith(("KF_PIPELINES", "KFP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def write_trial(folder, monkeypatch, **changes):
    """Write the recipe into ``folder``, which becomes the current one; return its name."""
    monkeypatch.chdir(folder)
    (folder / "trial.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return "trial.yaml"


def submit(api, *arguments, recipe="trial.yaml"):
    host = ["--host", api.endpoint] if api is not None else []
    return CliRunner().invoke(main, ["submit", recipe, *host, *map(str, arguments)])


def error_of(result, status=1):
    """The one line that a failed command writes after its hints."""
    assert result.exit_code == status, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("hint: ", "version "))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    return lines[0].removeprefix("error: ")


FIRST = task("resolve-base", "Succeeded", ago=600)
"""A task that is done."""
STEPS = ("calibrate", "score-layers", "prune-step", "recover-train")


def phase(number, last="Succeeded", steps=STEPS):
    """The tasks of a phase, of which the last may not be done yet."""
    name = "phase" if number == 1 else f"phase-{number}"
    states = ["Succeeded"] * (len(steps) - 1) + [last]
    start = 500 - 40 * number
    return [
        task(f"{name}.{step}", state, ago=start - 10 * i)
        for i, (step, state) in enumerate(zip(steps, states, strict=True))
    ]


def lines_of(result):
    """What was shown, without its times."""
    lines = [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in result.stderr.splitlines()[1:]]
    return [re.sub(r"after .*", "after", re.sub(r" +", " ", line)) for line in lines]


def wait_for(api, *frames):
    api.frames = list(frames)
    return submit(api, "--wait", "--every", "0.01s")


def failure_of(result):
    """The one line of the error."""
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith(f" {result.stdout.split()[-1]}")
    return line.removeprefix("error: ")
