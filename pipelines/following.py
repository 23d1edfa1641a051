"""Following a run on a cluster: how its tasks get on, and in one line why it cannot go on.

The API of Kubeflow Pipelines tells the state of each task, and mostly not why: a task whose image cannot be
pulled stands as running for ever. Why is looked for wherever it may stand: with the tasks, with Argo's pods.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from core.errors import ClusterError
from core.record import seconds_text
from pipelines.kfp_access import QUOTA, Client, explain, is_passing, one_line, quiet, quota_advice
from pipelines.pods import Pod, troubled_pods

_ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_WAITS = {"", "PENDING", "RUNNING", "RUNTIME_STATE_UNSPECIFIED"}
_TRIES = 8
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SLOW_S = 30.0
"""After so long a pod that waits is asked why."""
_LATE_S = 300.0
_PENDING = (
    "it has waited for over five minutes, and the API does not say why. See `kubectl describe pod`: mostly "
    "an image that cannot be pulled, no node with room, a quota, or a queue that has not admitted it."
)

_NAMELESS = "a task"
_IMAGE = "ImagePull|ErrImage|InvalidImageName|pull access denied|manifest unknown|failed to pull"
_NODES = "Unschedulable|nodes are available|Insufficient|FailedScheduling"
_CAUSES: tuple[tuple[str, str, str], ...] = (
    # what is said, what that is, what to do
    (
        _IMAGE,
        "its image cannot be pulled",
        "Correct cluster.image, push it, or give the namespace's service account the registry's secret.",
    ),
    (QUOTA.pattern, "a quota is used up", quota_advice()),
    (
        _NODES,
        "no node has room for it",
        "Lower cluster.gpus, cluster.cpu or cluster.memory, correct cluster.gpu_type, or add nodes.",
    ),
    (
        "OOMKilled|exit code:? ?137|out of memory",
        "it ran out of memory",
        "Raise cluster.memory or lower micro_batch; submitted again, the run goes on where it stopped.",
    ),
    (
        "SchedulingGated|scheduling gate",
        "Kueue has not admitted it",
        "Wait, or look at the queue that cluster.queue names: is it there, has it room?",
    ),
    (
        "CreateContainerConfigError",
        "its container cannot be made",
        "Build the image from docker/Dockerfile, and let cluster.run_as_user be a number other than 0.",
    ),
    (
        "Evicted|Preempt|pod deleted|low on resource|node (was )?(lost|shut)|imminent node",
        "its node took it away",
        "Submit it again: the run goes on where it stopped.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """A task of a run, as the API tells of it."""

    name: str
    state: str
    """Of the API's states; "" if there is none yet."""
    reason: str = ""
    """What is said of why it is in that state."""
    seconds: float = 0.0
    """How long it took, or has taken so far."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A run at one time."""

    state: str
    tasks: tuple[TaskState, ...]
    """Those that there are so far, in the order of their start."""
    trouble: str = ""
    """Why it waits or has failed, and what to do; "" if nothing is known."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing changes any more."""
        return self.state in _ENDED


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for what, in seconds."""

    timeout_s: float = 0.0
    """For the end of the run; 0 is for ever."""
    poll_s: float = 10.0
    """Between two questions."""
    image_s: float = 300.0
    """For an image that cannot be pulled: a registry may come back."""


def follow(
    client: Client,
    run_id: str,
    tasks: Mapping[str, str],
    show: Callable[[Progress], None],
    patience: Patience,
) -> Progress:
    """Ask for a run until it has ended.

    Args:
        client: The connection.
        run_id: Which run.
        tasks: Task in the IR to how people call it; ``{}`` stands for the phase.
        show: Called with each answer.
        patience: How long to wait.

    Returns:
        How it ended.

    Raises:
        ClusterError: If the cluster cannot be asked any more, an image cannot be pulled, or time is up. The
            run goes on then.
    """
    started, stuck_since = time.monotonic(), None
    while True:
        progress = _progress(client, run_id, tasks, patience)
        show(progress)
        if progress.has_ended:
            return progress
        now = time.monotonic()
        stuck_since = (stuck_since or now) if _IMAGE_TROUBLE in progress.trouble else None
        if stuck_since is not None and now - stuck_since >= patience.image_s:
            raise ClusterError(f"{progress.trouble} The run waits: {client.link('runs', run_id)}")
        if patience.timeout_s and now - started >= patience.timeout_s:
            raise ClusterError(
                f"--timeout: the run has not ended in {seconds_text(patience.timeout_s)}, and goes on. "
                f"Follow it at {client.link('runs', run_id)}"
            )
        left = started + patience.timeout_s - now if patience.timeout_s else patience.poll_s
        time.sleep(min(patience.poll_s, left))


def _ask(client: Client, run_id: str, patience: Patience) -> Any:
    """Return the run; what passes is waited for, longer each time."""
    for attempt in range(_TRIES):
        try:
            with quiet():
                return client.get_run(run_id)
        except ClusterError as error:
            problem: str = str(error)
        except Exception as error:
            problem = explain(error, client.place())
            if is_passing(error) and attempt < _TRIES - 1:
                pause = max(_SHORTEST_PAUSE_S, patience.poll_s) * 2**attempt
                time.sleep(min(_LONGEST_PAUSE_S, pause))
                continue
        break
    raise ClusterError(f"{problem} The run goes on: {client.link('runs', run_id)}")


def _progress(client: Client, run_id: str, tasks: Mapping[str, str], patience: Patience) -> Progress:
    """Ask for a run, and for its pods where it waits or has failed."""
    run = _ask(client, run_id, patience)
    details = list((run.run_details and run.run_details.task_details) or ())
    details.sort(key=lambda detail: (_when(detail.create_time), _when(detail.start_time)))
    states = tuple(_states(details, tasks))
    slow = any(detail.state == "PENDING" and _seconds(detail) > _SLOW_S for detail in details)
    pods: list[Pod] = []
    if slow or run.state == "FAILED":
        with quiet():
            pods = troubled_pods(client, run_id, tasks)
    return Progress(state=str(run.state or ""), tasks=states, trouble=_trouble(run, details, states, pods))


def _states(details: list[Any], tasks: Mapping[str, str]) -> Iterator[TaskState]:
    """Yield the tasks of the pipeline, without drivers, executors and groups.

    The API does not say to which phase a task belongs. Phases come one after another: the n-th task of a name
    is that of phase n.
    """
    counts = Counter[str]()
    by_shown = {shown: name for name, shown in tasks.items()}
    for detail in details:
        name = by_shown.get(detail.display_name, detail.display_name)
        if name not in tasks:
            continue
        counts[name] += 1
        yield TaskState(
            name=tasks[name].format(counts[name]),
            state=str(detail.state or ""),
            reason=_reason(detail),
            seconds=_seconds(detail),
        )


def _when(moment: datetime | None) -> float:
    """Return a time in seconds since 1970; 0 for none, which the API writes as the year 1."""
    return max(moment.timestamp(), 0.0) if moment else 0.0


def _seconds(detail: Any) -> float:
    begin = _when(detail.start_time) or _when(detail.create_time)
    return max((_when(detail.end_time) or time.time()) - begin, 0.0) if begin else 0.0


def _reason(detail: Any) -> str:
    """Return what is said of a task or run: beside it, or in its history."""
    history = list(detail.state_history or ())
    if detail.state != "FAILED":
        history = history[-1:]  # what a task has waited for before is over
    found = [detail.error] + [status.error for status in reversed(history)]
    return next((one_line(error.message) for error in found if error and error.message), "")


def _trouble(run: Any, details: list[Any], states: tuple[TaskState, ...], pods: list[Pod]) -> str:
    """Return in one line why a run waits or has failed, and what to do."""
    failed = run.state == "FAILED"
    wanted = {"FAILED"} if failed else _WAITS
    said = [(task.name, task.reason) for task in states if task.state in wanted]
    # What stands for a pod, whose name says nothing: a task's driver, and its executor.
    said += [(_task_of(detail), _reason(detail)) for detail in details if (detail.state or "") in wanted]
    done = {task.name for task in states if task.state in ("SUCCEEDED", "SKIPPED")}  # at a later attempt
    said += [
        (pod.task or "a task", pod.message) for pod in pods if pod.failed == failed and pod.task not in done
    ]
    said.append(("the run", _reason(run)))
    for name, reason in said:
        if cause := _cause(reason):
            return f"{name}: {cause[0]} ({reason}). {cause[1]}"
    if run.state == "CANCELED":
        return "the run was cancelled. Submit it again: it goes on where it stopped."
    if not failed:
        late = [detail for detail in details if detail.state == "PENDING" and _seconds(detail) > _LATE_S]
        return f"{_waiting(late[0], states)}: {_PENDING}" if late else ""
    name, reason = next((each for each in said if each[1]), said[0])
    return f"{name} failed{f': {reason}' if reason else ''}. Its log is in the UI."


def _waiting(detail: Any, states: tuple[TaskState, ...]) -> str:
    """Return whose pod it is that waits: its own name, or that of the tasks that seem to run."""
    name = _task_of(detail)
    running = [task.name for task in states if task.state == "RUNNING"]
    return name if name != _NAMELESS or not running else " or ".join(running)


def _task_of(detail: Any) -> str:
    name = str(detail.display_name or _NAMELESS)
    return _NAMELESS if name.startswith("executor") else one_line(name.removesuffix("-driver"), 60)


def _cause(reason: str) -> tuple[str, str] | None:
    for pattern, what, advice in _CAUSES:
        if re.search(pattern, reason, re.IGNORECASE):
            return what, advice
    return None


_IMAGE_TROUBLE = _CAUSES[0][1]
