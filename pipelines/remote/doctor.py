"""Whether a cluster has what a run needs: asked of Kubeflow Pipelines, of pods there, and of Kubernetes.

One small pipeline starts a pod in each place where pods of the run would be; each says what it finds. Who has
a kubeconfig also learns what Kubernetes knows: the keys of the secret, the nodes, why a pod waits.
"""

import contextlib
import dataclasses
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Literal

from core.errors import ClusterError
from core.quantities import seconds_text
from core.redaction import one_line
from core.scratch import scratch_folder
from core.settings.schema import Settings
from core.steps.check_pod import CHECKS, MARK, Finding
from pipelines.cluster import CONFIG_KEYS, SECRET_KEYS
from pipelines.remote.client import Client, is_passing
from pipelines.remote.fitting import fitting
from pipelines.remote.following import ENDED, IMAGE_TROUBLE, ask, explained
from pipelines.remote.kubernetes_api import Kubernetes
from pipelines.remote.probe import Pod, largest_pods, pods_of, write_probe
from pipelines.remote.submission import Submission, experiment_id
from pipelines.remote.view import RETRIES
from pipelines.remote.workflow import FAILED, TaskState, Workflow

_IMAGE_S = 60.0
"""How long an image may fail to be pulled: a registry may come back."""
_BUILD = "Build it from docker/Dockerfile of this version, push it, and name it in cluster.image."
_PULL_KEYS = (".dockerconfigjson", ".dockercfg")
_ALL_THERE = Finding(check="pods", state="ok", said="they find all that they look for")
_DRIVER = "'s driver"
_TRIES = 3  # to delete the small pipeline
_DEFAULT_NAMESPACE = "kubeflow"
_NAMED = "|".join(map(re.escape, CHECKS))


def examine(
    client: Client,
    submission: Submission,
    *,
    experiment: str,
    timeout_s: float,
    poll_s: float,
    kubernetes: Kubernetes | None = None,
) -> list[Finding]:
    """Check a cluster for a run.

    Args:
        client: The connection.
        submission: What would be started.
        experiment: Experiment of Kubeflow Pipelines for the small pipeline, which is deleted at the end.
        timeout_s: How long to wait for the pods of the small pipeline.
        poll_s: Pause between two requests.
        kubernetes: The Kubernetes API, where it may be asked.

    Returns:
        What was found, in the order of the checks.

    Raises:
        ClusterError: If Kubeflow Pipelines can no longer be reached, or refuses the small pipeline.
    """
    found = [_server(client)]
    pods = pods_of(submission)
    probe = _Probe(client, kubernetes)
    probe.start(submission, largest_pods(pods), experiment)
    try:
        found += probe.watch(timeout_s, poll_s)
    finally:
        found += probe.end()
    if kubernetes is not None:
        found += _seen_by_kubernetes(kubernetes, submission.settings, pods, probe.namespace)
    return found


def _server(client: Client) -> Finding:
    with client.asked():
        version = client.version()
    ours = metadata.version("kfp")
    where = f"{client.place()} is Kubeflow Pipelines {version or '(it does not say which version)'}"
    if version and _minor(version) < _minor(ours):
        said = f"{where}, older than kfp {ours}, which compiles the pipeline. Upgrade it, or try a run first."
        return Finding(check="server", state="note", said=said)
    return Finding(check="server", state="ok", said=where)


def _minor(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


class _Probe:
    """The small pipeline, from its start to its end."""

    def __init__(self, client: Client, kubernetes: Kubernetes | None) -> None:
        self._client, self._kubernetes = client, kubernetes
        self._run_id, self._components = "", list[str]()
        self._has_ended, self._is_unexplained = False, False
        self.namespace = client.namespace or _DEFAULT_NAMESPACE

    def start(self, submission: Submission, pods: Sequence[Pod], experiment: str) -> None:
        self._components = [pod.component for pod in pods]
        place = experiment_id(self._client, experiment)
        with scratch_folder() as folder, self._client.asked():
            path = folder / "doctor.yaml"
            write_probe(submission, pods, path)
            run = self._client.run_pipeline(
                experiment_id=place,
                job_name="adapt-pruner doctor",
                pipeline_package_path=str(path),
                service_account=submission.service_account,
            )
        self._run_id = str(run.run_id)

    def watch(self, timeout_s: float, poll_s: float) -> list[Finding]:
        """Wait until each pod has told what it finds, or it is clear why it does not."""
        until = time.monotonic() + timeout_s
        told, stuck = dict[str, list[Finding]](), dict[str, float]()
        while True:
            progress = ask(self._client, self._run_id, {name: name for name in self._components}, poll_s)
            workflow, now = progress.workflow or Workflow(), time.monotonic()
            self.namespace = workflow.namespace or self.namespace
            self._has_ended = progress.state in ENDED
            is_over = self._has_ended or now >= until
            # A task takes the place of its driver, which comes before it.
            tasks = {task.name.removesuffix(_DRIVER): task for task in workflow.drivers + workflow.tasks}
            for name, task in tasks.items():
                if name not in told and (found := self._told_by(task)):
                    told[name] = found
            waiting = {
                name: explained(self._as_kubernetes_says(name, task))
                for name, task in tasks.items()
                if name not in told and task.phase == "Pending"
            }
            of_images = [name for name, trouble in waiting.items() if trouble.about.endswith(IMAGE_TROUBLE)]
            stuck = {name: stuck.get(name, now) for name in of_images}
            for name, trouble in waiting.items():
                if is_over or now - stuck.get(name, now) >= min(_IMAGE_S, timeout_s):
                    told[name] = [Finding(check="pods", state="fix", said=trouble.text)]
            silent = [name for name in self._components if name not in told]
            of_all = told.keys() - set(self._components)  # the driver above the tasks
            if not silent or of_all or is_over:
                break
            time.sleep(min(poll_s, max(until - now, 0.0)))
        if silent and not of_all:
            told |= {name: [self._silent(name, progress.state, timeout_s)] for name in silent}
        retries = [_retries(workflow.retry_policy)] if tasks else []
        return [*_summed_up(told), *retries]

    def end(self) -> list[Finding]:
        """Delete the run, which ends it, too; one whose log has to be read is only ended."""
        if self._is_unexplained and self._has_ended:
            return []
        end = self._client.terminate_run if self._is_unexplained else self._client.delete_run
        for _ in range(_TRIES):
            try:
                with self._client.asked():
                    end(self._run_id)
                return []
            except ClusterError as error:
                problem = error
                if getattr(problem.__cause__, "status", None) == 404:  # the reply to the first try was lost
                    return []
                if not is_passing(problem.__cause__):
                    break
        where = self._client.link("runs", self._run_id)
        return [Finding(check="pods", state="note", said=f"{problem} Delete the doctor's run: {where}")]

    def _told_by(self, task: TaskState) -> list[Finding]:
        """Return what a task has found, or that it has failed; nothing of one that has not ended."""
        if task.name.endswith(_DRIVER):
            if task.phase in FAILED:
                return [Finding(check="pods", state="fix", said=explained(task).text)]
            return []
        for pod in reversed(task.ended_pods):
            if found := _findings(self._client.log(self._run_id, pod)):
                return found
        if task.phase == "Succeeded":  # its log cannot be read
            return [_ALL_THERE]
        if task.phase not in FAILED:
            return []
        if found := [
            Finding(check=match[1], state="fix", said=f"{match[2].strip('. ')}.")
            for match in re.finditer(rf"error: ({_NAMED}): (.*?)(?=error: (?:{_NAMED}): |$)", task.message)
        ]:
            return found
        if "No module named" in task.message:
            said = f"{task.name}: the image holds an older version of adapt-pruner, or another program"
            return [Finding(check="image", state="fix", said=f"{said} ({task.message}). {_BUILD}")]
        self._is_unexplained = True
        link = self._client.link("runs", self._run_id)
        said = f"{explained(task).text} If the log names a missing module: {_BUILD} {link}"
        return [Finding(check="pods", state="fix", said=said)]

    def _silent(self, name: str, state: str, timeout_s: float) -> Finding:
        """Return what is to be said of a pod that has not told anything."""
        if state == "SUCCEEDED":
            return _ALL_THERE
        link = self._client.link("runs", self._run_id)
        if state in ENDED:
            self._is_unexplained = True
            return Finding(check="pods", state="fix", said=f"{name} failed. Its log is in the UI: {link}")
        said = (
            f"{name} has told nothing within {seconds_text(timeout_s)}. Give more time by --timeout, or see "
        )
        return Finding(check="pods", state="fix", said=f"{said}`kubectl describe pod`.")

    def _as_kubernetes_says(self, name: str, task: TaskState) -> TaskState:
        """Return a waiting task with the reason that Kubernetes gives, where that may be asked."""
        reason = ""
        if self._kubernetes is not None:
            with contextlib.suppress(ClusterError):
                reason = self._kubernetes.why_it_waits(self.namespace, self._run_id, name)
        return dataclasses.replace(task, message=reason or task.message or "it waits")


def _findings(log: str) -> list[Finding]:
    """Return the findings in the log of a pod, none if there are none."""
    for line in log.splitlines():
        if MARK in line:
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                found = [Finding(**each) for each in json.loads(line.partition(MARK)[2])]
                return [dataclasses.replace(each, said=one_line(each.said)) for each in found]
    return []


def _summed_up(told: Mapping[str, list[Finding]]) -> Iterator[Finding]:
    """Yield each finding once, with the pods it is of if not all say so."""
    pods = defaultdict[Finding, list[str]](list)
    for name, findings in told.items():
        for finding in findings:
            pods[finding].append(name)
    order = ("pods", *CHECKS)
    not_begun = {name for f, names in pods.items() if (f.check, f.state) == ("pods", "fix") for name in names}
    known = [finding for finding in pods if finding.check in order]  # an image of later versions may say more
    for finding in sorted(known, key=lambda finding: order.index(finding.check)):
        by_all = finding.check == "pods" or set(pods[finding]) == told.keys() - not_begun
        where = "" if by_all else f"{', '.join(pods[finding])}: "
        yield dataclasses.replace(finding, said=f"{where}{finding.said}")


def _retries(policy: str) -> Finding:
    said = f"{RETRIES.get(policy, 'see Argo')} (Argo's retryPolicy is {policy} here)"
    if policy == "Always":
        return Finding(check="retries", state="ok", said=said)
    advice = "Use submit --wait --attempts, or have the administrator set Always"
    return Finding(check="retries", state="note", said=f"{said}. {advice} (docs/operating.md).")


def _seen_by_kubernetes(
    kubernetes: Kubernetes, settings: Settings, pods: Sequence[Pod], namespace: str
) -> Iterator[Finding]:
    """Yield what the objects of the namespace and the nodes say."""
    cluster, on_s3 = settings.cluster, settings.storage.store.startswith("s3://")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if on_s3 else ()
    addresses = () if settings.tracking.uri else ("MLFLOW_TRACKING_URI",)
    objects = [
        _Object(kind="secret", name=cluster.secret, known=SECRET_KEYS, needed=keys),
        _Object(kind="config_map", name=cluster.config_map, known=CONFIG_KEYS, needed=addresses),
        *(
            _Object(kind="secret", name=name, known=_PULL_KEYS, needed=())
            for name in cluster.image_pull_secrets
        ),
    ]
    for each in objects:
        if each.name:
            yield from _asked(partial(each.look, kubernetes, namespace))
    yield from _asked(lambda: fitting(pods, kubernetes.nodes()))


def _asked(look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except ClusterError as error:
        return [Finding(check="kubernetes", state="note", said=str(error))]


@dataclass(frozen=True, kw_only=True)
class _Object:
    """A secret or config map of a run, with the keys that tasks read, and those without which less works."""

    kind: Literal["secret", "config_map"]
    name: str
    known: tuple[str, ...]
    needed: tuple[str, ...]

    def look(self, kubernetes: Kubernetes, namespace: str) -> list[Finding]:
        check = self.kind.replace("_", " ")
        keys = kubernetes.keys_of(self.kind, namespace, self.name)
        if keys is None:
            said = (
                f"there is no {check} {self.name} in the namespace {namespace}. Create it there (see "
                "Install in docs/operating.md), or correct its name in the section cluster."
            )
            return [Finding(check=check, state="fix", said=said)]
        said = f"{self.name} has {', '.join(sorted(keys & set(self.known))) or 'no key that tasks read'}"
        if unknown := keys - set(self.known):
            said += f" (and {', '.join(sorted(unknown))}, which no task reads)"
        if lacks := [key for key in self.needed if key not in keys]:
            without = "pods need a cloud role" if self.kind == "secret" else "nothing is tracked in MLflow"
            said += f". It lacks {' and '.join(lacks)}: without, {without}. Add them if that is not meant."
            return [Finding(check=check, state="note", said=said)]
        return [Finding(check=check, state="ok", said=said)]
