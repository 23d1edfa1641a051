"""The command ``doctor``, what its pods say, and what it prints."""

import json
import re

from click.testing import CliRunner

from core.steps.check_pod import CHECKS, MARK
from pipelines.cli import main
from tests.support.argo import task
from tests.support.kfp_api import frame

PODS = ("calibrate", "finalize")
"""Components in the two places of the trial's pods: with an accelerator and without."""
PULL = (
    'ImagePullBackOff: Back-off pulling image "registry.example/adapt-pruner-python@sha256:0": ErrImagePull: '
    "rpc error: code = NotFound desc = failed to resolve reference: not found"
)


def node(name, allocatable, *, labels=None, taints=()):
    metadata = {"name": name, "labels": labels or {}}
    return {"metadata": metadata, "spec": {"taints": list(taints)}, "status": {"allocatable": allocatable}}


def findings(**changed):
    """The findings of a pod as its log has them; of a check that is not right, its state and words."""
    found = [
        {"check": check, "state": "ok", "said": f"{check} is right"} | changed.get(check, {})
        for check in CHECKS
    ]
    return f'{{"time":"now"}}\n10:00:00 INFO check-pod: {MARK}{json.dumps(found)}\n{{"msg":"uploading"}}\n'


def ended(*pods, state="SUCCEEDED", phase="Succeeded", message="", **more):
    return frame(state, *(task(f"root.{pod}", phase, message) for pod in pods), **more)


def doctor(api, *arguments, recipe="trial.yaml"):
    command = ["doctor", recipe, "--host", api.endpoint, "--every", "0.01s", *map(str, arguments)]
    return CliRunner().invoke(main, command)


def table(result):
    """State and words by check; of several findings of a check, all."""
    rows = [re.split(r"\s{2,}", line, maxsplit=2) for line in result.stdout.splitlines()]
    lines = {}
    for state, check, said in rows:
        lines.setdefault(check, []).append((state, said))
    return lines


def fixes(result):
    assert result.exit_code == 1, result.output
    return [f"{c}: {said}" for c, found in table(result).items() for state, said in found if state == "fix"]
