"""Following a run on a cluster: the progress of its tasks, and in one line why it waits or has failed.

The state of the run is that of the API; all else is read from Argo's workflow (see ``workflow.py``). kfp's
client only waits for the state, gives up at the first error of the network, and reports no reason.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ClusterError
from pipelines.remote.client import Client, is_passing, one_line
from pipelines.remote.workflow import FAILED, TaskState, Workflow, read_workflow

ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
"""States of a run that does not change any more."""

_TRIES = 8
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SLOW_S, _LATE_S = 30.0, 300.0
"""How long a pod may wait before its reason is reported, and before one without a reason is."""

_RESUMES = "Submit it again: it resumes where it stopped"
_CAUSES: tuple[tuple[str, str, str], ...] = (
    # Argo's reason, its meaning, and what to do; {own} is where the task's settings are
    (
        "ImagePull|ErrImage|InvalidImageName|pull access denied|manifest unknown|failed to pull",
        "its image cannot be pulled",
        "Correct cluster.image, push it, or give the namespace's service account the registry's secret.",
    ),
    (
        "exceeded quota|quota exceeded",
        "a quota is used up",
        "Wait for other runs to end, raise the quota, or lower {own}.gpus, {own}.cpu and {own}.memory.",
    ),
    (
        "Unschedulable|nodes are available|Insufficient|FailedScheduling",
        "no node has room for it",
        "Lower {own}.gpus, {own}.cpu or {own}.memory, correct {own}.gpu_type, or add nodes.",
    ),
    (
        "OOMKilled|exit code:? ?137|out of memory",
        "it ran out of memory",
        "Raise {own}.memory or lower micro_batch, and submit it again: it resumes where it stopped.",
    ),
    (
        "SchedulingGated|scheduling gate",
        "Kueue has not admitted it",
        "Wait, or check that the queue named by {own}.queue exists and has room.",
    ),
    (
        "CreateContainerConfigError",
        "its container cannot be created",
        "Build the image from docker/Dockerfile, and set cluster.run_as_user to a number other than 0.",
    ),
    (
        "DeadlineExceeded|longer than the specified deadline|exceeded its deadline",
        "it took longer than {own}.timeout",
        "Raise that, and submit it again: it resumes where it stopped.",
    ),
    (
        "EmptyDir|exceed.*ephemeral",
        "its temporary files are too large",
        "Raise {own}.scratch, or {own}.shared_memory if that volume is named.",
    ),
    (
        "pod deleted|exit code:? ?143|Evict|Preempt|low on resource|imminent node|unresponsive|NodeLost",
        "it lost its pod",
        f"{_RESUMES}. --attempts does that for you.",
    ),
)
IMAGE_TROUBLE, _LOST = _CAUSES[0][1], _CAUSES[-1][1]
"""The first is how the trouble of a task ends whose image cannot be pulled."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a run waits or has failed."""

    about: str  # the task and its trouble: while a run waits, the words for it may change
    text: str  # all of it in one line, with what to do


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A run at one time."""

    state: str  # of the API's states
    workflow: Workflow | None  # None where the server does not give it
    trouble: Trouble | None = None
    lost_pods: bool = False  # whether it has failed only because it lost pods, and may be started again


def follow(
    client: Client,
    run_id: str,
    tasks: Mapping[str, str],
    show: Callable[[Progress], None],
    *,
    poll_s: float = 10.0,
    image_s: float = 300.0,
    until: float | None = None,
) -> Progress:
    """Poll a run until it has ended.

    Args:
        client: The connection.
        run_id: Which run.
        tasks: As in ``Package``.
        show: Called with each answer.
        poll_s: Pause between two requests.
        image_s: How long to wait for an image that cannot be pulled: a registry may come back.
        until: When to stop, by ``time.monotonic``; None waits for the end.

    Raises:
        ClusterError: If the cluster can no longer be reached, an image cannot be pulled, or time is up. The
            run continues then.
    """
    stuck_since = None
    while True:
        progress = ask(client, run_id, tasks, poll_s)
        show(progress)
        if progress.state in ENDED:
            return progress
        now, trouble = time.monotonic(), progress.trouble
        stuck_since = (stuck_since or now) if trouble and trouble.about.endswith(IMAGE_TROUBLE) else None
        if trouble and stuck_since is not None and now - stuck_since >= image_s:
            raise ClusterError(f"{trouble.text} The run waits: {client.link('runs', run_id)}")
        if until is not None and now >= until:
            raise ClusterError(f"--timeout is over; the run continues: {client.link('runs', run_id)}")
        time.sleep(poll_s if until is None else min(poll_s, until - now))


def ask(client: Client, run_id: str, tasks: Mapping[str, str], poll_s: float) -> Progress:
    """Return where a run is now.

    Args:
        client: The connection.
        run_id: Which run.
        tasks: As in ``Package``.
        poll_s: Pause before the second try, if the first meets a passing error.

    Raises:
        ClusterError: If the cluster cannot be reached. The run continues then.
    """
    run, manifest = _ask(client, run_id, poll_s)
    return _progress(run, None if manifest is None else read_workflow(manifest, tasks))


def _ask(client: Client, run_id: str, poll_s: float) -> tuple[Any, dict[str, Any] | None]:
    """Return the run and Argo's workflow; passing errors are waited for, longer each time."""
    run = None
    for attempt in range(_TRIES):
        try:
            with client.asked():
                run = client.get_run(run_id)
                return run, client.workflow(run_id)
        except ClusterError as error:
            problem = error
        if not is_passing(problem.__cause__):
            break
        if attempt < _TRIES - 1:
            time.sleep(min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, poll_s) * 2**attempt))
    if run is not None:
        return run, None  # only the older API is missing
    raise ClusterError(f"{problem} The run continues: {client.link('runs', run_id)}")


def _progress(run: Any, workflow: Workflow | None) -> Progress:
    state, found = str(run.state or ""), workflow or Workflow()
    was_terminated = found.was_terminated or any(
        past.state in ("CANCELING", "CANCELED") for past in run.state_history or ()
    )
    if state not in ENDED:
        trouble = None if was_terminated else _why_it_waits(found)
        return Progress(state=state, workflow=workflow, trouble=trouble)
    if state == "CANCELED" or (state == "FAILED" and was_terminated):
        text = f"the run was terminated, by a person or a program. {_RESUMES}."
        return Progress(state=state, workflow=workflow, trouble=Trouble(about="terminated", text=text))
    if state != "FAILED":
        return Progress(state=state, workflow=workflow)
    failed = [task for task in found.tasks + found.drivers if task.phase in FAILED]
    failed.sort(key=lambda task: (task.finished, task.started))
    # finalize runs whatever has failed before it, and may fail for the same reason
    failed = [task for task in failed if "finalize" not in task.name] or failed
    troubles = [explained(task) for task in failed]
    if not troubles:
        said = found.message or one_line((run.error and run.error.message) or "")
        text = f"the run failed{said and ': '}{said}. Its log is in the UI."
        troubles = [Trouble(about="the run", text=text)]
    lost = all(trouble.about.endswith(_LOST) for trouble in troubles)
    return Progress(state=state, workflow=workflow, trouble=troubles[0], lost_pods=lost)


def _why_it_waits(workflow: Workflow) -> Trouble | None:
    waiting = [task for task in workflow.tasks + workflow.drivers if task.phase == "Pending"]
    slow = [task for task in waiting if time.time() - task.started > _SLOW_S]
    for task in slow:
        if _cause(task.message):
            return explained(task)
    for task in slow:
        if time.time() - task.started > _LATE_S:
            about = f"{task.name} has waited for over five minutes"
            said = f" ({task.message})" if task.message else ""
            return Trouble(about=about, text=f"{about}{said}. See `kubectl describe pod`.")
    return None


def explained(task: TaskState) -> Trouble:
    """Return why a task waits or has failed: by Kubernetes' words, or by the last line of its own log."""
    how, error, own_words = task.message.partition("error: ")
    if cause := _cause(how if error else task.message):
        what, advice = (text.format(own=task.settings) for text in cause)
        about = f"{task.name}: {what}"
        return Trouble(about=about, text=f"{about} ({one_line(task.message, 400)}). {advice}")
    text = f"{task.name} failed: {own_words}." if own_words else f"{task.name} failed: {task.message}."
    return Trouble(about=task.name, text=text if own_words else f"{text} Its log is in the UI.")


def _cause(reason: str) -> tuple[str, str] | None:
    for pattern, what, advice in _CAUSES:
        if re.search(pattern, reason, re.IGNORECASE):
            return what, advice
    return None
