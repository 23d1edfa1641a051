"""A cluster in small: runs a compiled pipeline as the driver and the launcher of KFP do, without kfp.local.

Every attempt of a task is a process of its own with the command of the IR, a fresh folder for its home, its
temporary files and what KFP mounts, and no other environment than the pod's: the secret and the config map.
Artifacts travel over S3. What fails is tried again as the task's retry policy says; what depends on a failed
task is not started; the exit task always is.
"""

import contextlib
import dataclasses
import json
import operator
import os
import random
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import yaml

from tests.support.project import ROOT

SUCCEEDED, FAILED, SKIPPED = "SUCCEEDED", "FAILED", "SKIPPED"

# In a pod S3 artifacts lie below /s3, which no other program of this machine may see.
_MOUNTS = """
import os
if os.environ.get("_KFP_RUNTIME"):
    from kfp.dsl.types import artifact_types
    artifact_types._S3_LOCAL_MOUNT_PREFIX = os.environ["HOME"] + "/s3/"
"""


@dataclasses.dataclass(kw_only=True)
class TaskRun:
    """What became of a task."""

    path: str
    """Names of the nested pipelines that it is in and its own, with slashes."""
    state: str
    attempts: int = 0
    log: str = ""
    """What the last attempt has printed."""


class Cluster:
    """Runs pipelines whose artifacts go below ``root``, an S3 address."""

    def __init__(self, folder, root, *, config, secret, kill=None, seed=0):
        """Make one.

        Args:
            folder: Where the pods' folders are.
            root: The pipeline root.
            config: What the config map holds.
            secret: What the secret holds.
            kill: ``kill(task path, attempt)`` returns after how many seconds the attempt is ended with
                SIGKILL, as a node that dies does it; None if it is not.
            seed: Of the order in which tasks are taken that wait for nothing.
        """
        self._folder, self._root = folder, root
        self._config, self._secret = config, secret
        self._kill = kill or (lambda task, attempt: None)
        self._random = random.Random(seed)
        self._client = boto3.client("s3")

    def run(self, path, parameters):
        """Run the compiled pipeline in the file ``path``; return its state and its tasks in their order."""
        spec, platform = yaml.safe_load_all(path.read_text())
        run = _PipelineRun(self, spec, platform, uuid.uuid4().hex)
        definitions = spec["root"]["inputDefinitions"]["parameters"]
        unknown = parameters.keys() - definitions.keys()
        assert not unknown, f"the API server refuses unknown parameters: {unknown}"
        values = {name: parameters.get(name, d.get("defaultValue")) for name, d in definitions.items()}
        state, _ = run.dag("", spec["root"], {"parameters": values, "artifacts": {}})
        return state, run.tasks

    def upload(self, path, uri):
        """Bring an artifact, which is a file, to its address."""
        self._client.upload_file(str(path), **_at(uri))

    def download(self, uri, path):
        """Bring an artifact to a pod; one without content is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._client.download_file(**_at(uri), Filename=str(path))


class _PipelineRun:
    def __init__(self, cluster, spec, platform, job):
        self._cluster, self._spec, self._job = cluster, spec, job
        self._executors = spec["deploymentSpec"]["executors"]
        self._platform = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self.tasks = []

    def dag(self, path, component, inputs):
        """Run all tasks of a DAG; return its state and its outputs."""
        tasks, states, outputs = component["dag"]["tasks"], {}, {}
        while len(states) < len(tasks):
            ready = [
                name
                for name, task in tasks.items()
                if name not in states and states.keys() >= set(task.get("dependentTasks", ()))
            ]
            assert ready, "tasks wait for each other"
            name = self._cluster._random.choice(ready)
            states[name], outputs[name] = self._task(path, tasks[name], inputs, states, outputs)
        state = FAILED if FAILED in states.values() else SUCCEEDED
        found = {"parameters": {}, "artifacts": {}}
        for key, source in component["dag"].get("outputs", {}).get("parameters", {}).items():
            edge = source["valueFromParameter"]
            produced = outputs[edge["producerSubtask"]]
            if state == SUCCEEDED:
                found["parameters"][key] = produced["parameters"][edge["outputParameterKey"]]
        return state, found

    def _task(self, path, task, inputs, states, outputs):
        name = task["taskInfo"]["name"]
        path = f"{path}/{name}".lstrip("/")
        policy = task.get("triggerPolicy", {})
        before = {states[dependency] for dependency in task.get("dependentTasks", ())}
        if policy.get("strategy") != "ALL_UPSTREAM_TASKS_COMPLETED" and before - {SUCCEEDED}:
            return self._skip(path)
        given = self._inputs(task, inputs, states, outputs)
        if "condition" in policy and not _holds(policy["condition"], given["parameters"]):
            return self._skip(path)
        component = self._spec["components"][task["componentRef"]["name"]]
        if "dag" in component:
            return self.dag(path, component, given)
        run = TaskRun(path=path, state=FAILED)
        self.tasks.append(run)
        found = None
        while run.state == FAILED and run.attempts <= task.get("retryPolicy", {}).get("maxRetryCount", 0):
            run.attempts += 1
            found = self._attempt(run, component, given)
        return run.state, found

    def _skip(self, path):
        self.tasks.append(TaskRun(path=path, state=SKIPPED))
        return SKIPPED, None

    def _inputs(self, task, inputs, states, outputs):
        """Resolve what a task is given."""
        parameters, artifacts = {}, {}
        for key, edge in task.get("inputs", {}).get("parameters", {}).items():
            if "componentInputParameter" in edge:
                parameters[key] = inputs["parameters"][edge["componentInputParameter"]]
            elif "taskOutputParameter" in edge:
                source = edge["taskOutputParameter"]
                parameters[key] = outputs[source["producerTask"]]["parameters"][source["outputParameterKey"]]
            elif "taskFinalStatus" in edge:
                state = states[edge["taskFinalStatus"]["producerTask"]]
                parameters[key] = {
                    "state": state,
                    "pipelineJobResourceName": self._job,
                    "pipelineTaskName": edge["taskFinalStatus"]["producerTask"],
                }
            else:
                constant = edge["runtimeValue"]["constant"]
                parameters[key] = self._job if constant == "{{$.pipeline_job_uuid}}" else constant
        for key, edge in task.get("inputs", {}).get("parameters", {}).items():
            if "parameterExpressionSelector" in edge:
                parameters[key] = _selected(edge["parameterExpressionSelector"], parameters[key])
        for key, edge in task.get("inputs", {}).get("artifacts", {}).items():
            source = edge["taskOutputArtifact"]
            artifacts[key] = outputs[source["producerTask"]]["artifacts"][source["outputArtifactKey"]]
        return {"parameters": _as_api(parameters), "artifacts": artifacts}

    def _attempt(self, run, component, given):
        """Run a pod; return what it has put out, None if it has failed."""
        label = component["executorLabel"]
        pod = self._cluster._folder / f"{len(self.tasks):03d}-{label}-{run.attempts}"
        for folder in ("home", "tmp", "bin"):
            (pod / folder).mkdir(parents=True)
        (pod / "bin" / "sitecustomize.py").write_text(_MOUNTS)
        wanted = component.get("outputDefinitions", {})
        where = f"{self._cluster._root}/{self._job}/{label}/{run.attempts}"
        made = {
            name: {"name": name, "type": definition["artifactType"], "uri": f"{where}/{name}", "metadata": {}}
            for name, definition in wanted.get("artifacts", {}).items()
        }
        for artifact in given["artifacts"].values():
            self._cluster.download(artifact["uri"], _mounted(pod, artifact["uri"]))
        output_file = pod / "executor_output.json"
        executor_input = {
            "inputs": {
                "parameterValues": given["parameters"],
                "artifacts": {name: {"artifacts": [one]} for name, one in given["artifacts"].items()},
            },
            "outputs": {
                "parameters": {
                    name: {"outputFile": str(pod / "outputs" / name)} for name in wanted.get("parameters", {})
                },
                "artifacts": {name: {"artifacts": [artifact]} for name, artifact in made.items()},
                "outputFile": str(output_file),
            },
        }
        code, run.log = self._start(run, label, pod, executor_input)
        if code:
            return None
        run.state = SUCCEEDED
        told = json.loads(output_file.read_text()) if output_file.exists() else {}
        for name, artifact in made.items():
            for entry in told.get("artifacts", {}).get(name, {}).get("artifacts", ()):
                artifact |= {key: entry[key] for key in ("uri", "metadata") if key in entry}
            if _mounted(pod, artifact["uri"]).exists():
                self._cluster.upload(_mounted(pod, artifact["uri"]), artifact["uri"])
        values = told.get("parameterValues", {})
        assert values.keys() == wanted.get("parameters", {}).keys(), f"{run.path}: outputs {sorted(values)}"
        return {"parameters": values, "artifacts": made}

    def _start(self, run, label, pod, executor_input):
        container = self._executors[label]["container"]
        words = [*container["command"], *container.get("args", ())]
        command = [word.replace("{{$}}", json.dumps(executor_input)) for word in words]
        left = re.findall(r"\{\{\$[^}]*\}\}", "".join(command))
        assert not left, f"{run.path}: placeholders that nobody resolves: {left}"
        seconds = self._cluster._kill(run.path, run.attempts)
        with (pod / "log").open("w+") as log:
            process = subprocess.Popen(
                command,
                cwd=pod / "home",
                env=self._environment(label, pod),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            log.seek(0)
            return code, log.read()

    def _environment(self, label, pod):
        """Return the environment of a pod: the image's, the container's and what the platform spec maps."""
        image = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": f"{pod / 'bin'}:{ROOT}",
            "HOME": str(pod / "home"),
            "TMPDIR": str(pod / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        container = {e["name"]: e["value"] for e in self._executors[label]["container"].get("env", ())}
        platform = self._platform.get(label, {})
        mapped = {}
        for source in platform.get("configMapAsEnv", ()):
            for pair in source["keyToEnv"]:
                if pair["configMapKey"] in self._cluster._config:
                    mapped[pair["envVar"]] = self._cluster._config[pair["configMapKey"]]
        for source in platform.get("secretAsEnv", ()):
            for pair in source["keyToEnv"]:
                if pair["secretKey"] in self._cluster._secret:
                    mapped[pair["envVar"]] = self._cluster._secret[pair["secretKey"]]
        return image | container | mapped


def _holds(condition, parameters):
    """Evaluate a condition of the one kind that our pipeline has."""
    match = re.fullmatch(r"int\(inputs\.parameter_values\['([^']+)'\]\) (==|<=|>) (\d+)", condition)
    assert match, f"a condition of another kind: {condition}"
    compare = {"==": operator.eq, "<=": operator.le, ">": operator.gt}[match[2]]
    return compare(int(parameters[match[1]]), int(match[3]))


def _selected(expression, value):
    """Evaluate a selector of the one kind that our pipeline has; numbers of CEL's kinds do not mix."""
    match = re.fullmatch(r"number_value ([+-]) (\d+\.0)", expression)
    assert match, f"a selector of another kind: {expression}"
    return value + float(match[1] + match[2])


def _as_api(value):
    """Return JSON values as the driver writes them: it cannot tell 2.0 from 2, and writes 2."""
    if isinstance(value, dict):
        return {key: _as_api(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_as_api(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mounted(pod, uri):
    return pod / "home" / "s3" / uri.removeprefix("s3://")


def _at(uri):
    parts = urlsplit(uri)
    return {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}
