"""The step's part in a training by several nodes: it makes the TrainJob, follows it, and ends with it."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from components.nodes.api import Api, BusyApiError
from components.nodes.main import arguments_of
from components.nodes.train_job import NodeSettings, job_name, train_job
from core.errors import ClusterError, TrainingError
from core.runs.run import Run

T = TypeVar("T")

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""How often the TrainJob is looked at."""
BUSY_S = 600.0
"""How long the API may be out of reach while it is followed."""
GONE_S = 600.0
"""How long an earlier TrainJob may take to end."""
_RESUMES = "Rerunning the step resumes from the last saved state."
_TELLING = (
    "Unschedulable",
    "ImagePullBackOff",
    "ErrImagePull",
    "CreateContainerConfigError",
    "CrashLoopBackOff",
)


def train_on_nodes(run: Run, phase: int, checkpoint_uri: str, data_uri: str) -> None:
    """Have a phase trained by a TrainJob, whose first node publishes the result; see ``OnNodes``.

    Raises:
        ClusterError: If it cannot be created or followed.
        TrainingError: If it fails.
    """
    nodes, name = run.settings.training.nodes, job_name(run, phase)
    api, arguments = Api(nodes), arguments_of(run.handle(), phase, checkpoint_uri, data_uri)
    job = train_job(name, _asked(api.own_pod), nodes, NodeSettings.of(os.environ), arguments)
    with _ended_by_sigterm():
        try:
            _create(api, job)
            log.info("TrainJob %s/%s: %d nodes", api.namespace, name, nodes)
            _follow(api, name)
        finally:
            with contextlib.suppress(BusyApiError, ClusterError):  # it has an owner, too
                api.delete(name)


def _create(api: Api, job: dict[str, Any]) -> None:
    """Create the TrainJob, once one that an earlier attempt has left is gone: two would train the same."""
    name, deadline = job["metadata"]["name"], time.monotonic() + GONE_S
    while not _asked(lambda: api.create(job)):
        log.info("an earlier TrainJob %s is ended first; its states are in the store", name)
        _asked(lambda: api.delete(name))
        while _asked(lambda: api.job(name)) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the TrainJob {name} of an earlier attempt has not ended within {GONE_S / 60:.0f} "
                    "minutes. See what keeps its pods, and rerun the step."
                )
            time.sleep(min(LOOK_S, 1.0))


def _follow(api: Api, name: str) -> None:
    """Wait until the TrainJob is done, with the log of its first node in this one."""
    log_of_first, before = _Log(api), ""
    while True:
        job, pods = _asked(lambda: api.job(name)), _asked(lambda: api.pods(name))
        if job is None:
            raise TrainingError(f"the TrainJob {name} was deleted while it trained. {_RESUMES}")
        if 0 in pods:
            log_of_first.pass_on(pods[0]["metadata"]["name"])
        conditions = {
            condition["type"]: condition
            for condition in job.get("status", {}).get("conditions", ())
            if condition["status"] == "True"
        }
        if "Complete" in conditions:
            return
        if "Failed" in conditions:
            raise TrainingError(f"the TrainJob {name} has failed: {_cause(pods, conditions['Failed'])}")
        state = _state(pods, suspended="Suspended" in conditions)
        if state != before:
            log.info("TrainJob %s: %s", name, state)
        before = state
        time.sleep(LOOK_S)


def _asked(ask: Callable[[], T]) -> T:
    """Return what the API answers, as soon as it does."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return ask()
        except BusyApiError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"{error}. {_RESUMES}") from None
            log.warning("%s; asking again", error)
            time.sleep(LOOK_S)


class _Log:
    """Passes on what a node logs, line by line, as it is."""

    def __init__(self, api: Api) -> None:
        self._api, self._pod, self._last, self._asked_at = api, "", "", 0.0

    def pass_on(self, pod: str) -> None:
        since = None if pod != self._pod else round(time.monotonic() - self._asked_at) + 60
        last = "" if pod != self._pod else self._last
        asked_at = time.monotonic()
        try:
            lines = self._api.log(pod, since)
        except BusyApiError:
            return
        for line in lines:
            when, _, text = line.partition(" ")
            if when > last:
                print(text, file=sys.stderr, flush=True)
                last = when
        self._pod, self._last, self._asked_at = pod, last, asked_at


def _state(pods: dict[int, dict[str, Any]], *, suspended: bool) -> str:
    """Describe the nodes in one line, with what keeps one from starting."""
    if suspended:
        return "suspended, until its queue admits it"
    phases = [pod.get("status", {}).get("phase", "Pending") for pod in pods.values()]
    counted = ", ".join(f"{phases.count(phase)} {phase.lower()}" for phase in sorted(set(phases)))
    problems = (f"node {node}: {said}" for node, pod in sorted(pods.items()) for said in _problems(pod))
    return "; ".join(filter(None, [counted or "no pods yet", next(problems, "")]))


def _problems(pod: dict[str, Any]) -> Iterator[str]:
    status = pod.get("status", {})
    waiting = [each.get("state", {}).get("waiting", {}) for each in status.get("containerStatuses", ())]
    for problem in [*status.get("conditions", ()), *waiting]:
        if problem.get("reason") in _TELLING and problem.get("status") != "True":
            yield f"{problem['reason']}: {problem.get('message', '')}"


def _cause(pods: dict[int, dict[str, Any]], condition: dict[str, Any]) -> str:
    """Return the reason of the node that ended first, as its process or Kubernetes tells it."""
    ends = []
    for node, pod in pods.items():
        for container in pod.get("status", {}).get("containerStatuses", ()):
            for state in (container.get("lastState", {}), container.get("state", {})):
                end = state.get("terminated")
                if end and end.get("exitCode"):
                    said = end.get("message") or f"{end.get('reason', 'Error')}, exit code {end['exitCode']}"
                    ends.append((end.get("finishedAt", ""), node, said))
    if ends:
        _, node, said = min(ends)
        return f"node {node}: {' '.join(said.split()).removeprefix('error: ')}"
    return f"{condition.get('reason', '')}: {condition.get('message', '')}"


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which a pod is told to end, end the block as an exception does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
