"""Following a run on a cluster: how its tasks get on, and in one line why it waits or has failed.

The state of the run is that of the API; all else is read from Argo's workflow (see ``workflow.py``).
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import ClusterError
from core.runs.record import seconds_text
from pipelines.remote.client import QUOTA, Client, explain, is_passing, one_line, quiet, quota_advice
from pipelines.remote.workflow import FAILED, TaskState, Workflow, read_workflow

_ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_TRIES = 8
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SLOW_S, _LATE_S = 30.0, 300.0
"""How long a pod may wait before its reason is told, and before one without a reason is."""

_RESUMES = "Submit it again: it resumes where it stopped"
_CAUSES: tuple[tuple[str, str, str], ...] = (
    # Argo's reason, what that is, and what to do; {own} is where the task's settings are
    (
        "ImagePull|ErrImage|InvalidImageName|pull access denied|manifest unknown|failed to pull",
        "its image cannot be pulled",
        "Correct cluster.image, push it, or give the namespace's service account the registry's secret.",
    ),
    (QUOTA.pattern, "a quota is used up", quota_advice("{own}")),
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
        "Wait, or look at the queue that {own}.queue names: is it there, has it room?",
    ),
    (
        "CreateContainerConfigError",
        "its container cannot be made",
        "Build the image from docker/Dockerfile, and let cluster.run_as_user be a number other than 0.",
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
        "its pod was taken away",
        f"{_RESUMES}. --attempts does that by itself.",
    ),
)
_IMAGE, _TAKEN = _CAUSES[0][1], _CAUSES[-1][1]


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a run waits or has failed."""

    about: str
    """The task and what that is: while a run waits, the words for it may change."""
    text: str
    """All of it in one line, with what to do."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A run at one time."""

    state: str
    """Of the API's states."""
    workflow: Workflow | None
    """None where the server does not give it."""
    trouble: Trouble | None = None
    """None if nothing is known."""
    was_taken_away: bool = False
    """Whether it has failed for lost pods alone, and may be started again."""

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
    since: float = field(default_factory=time.monotonic)
    """When the waiting began."""


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
    stuck_since = None
    while True:
        run, manifest = _ask(client, run_id, patience)
        progress = _progress(run, None if manifest is None else read_workflow(manifest, tasks))
        show(progress)
        if progress.has_ended:
            return progress
        now, trouble = time.monotonic(), progress.trouble
        stuck_since = (stuck_since or now) if trouble and trouble.about.endswith(_IMAGE) else None
        if trouble and stuck_since is not None and now - stuck_since >= patience.image_s:
            raise ClusterError(f"{trouble.text} The run waits: {client.link('runs', run_id)}")
        if patience.timeout_s and now - patience.since >= patience.timeout_s:
            raise ClusterError(
                f"--timeout: the run has not ended in {seconds_text(patience.timeout_s)}, and goes on. "
                f"Follow it at {client.link('runs', run_id)}"
            )
        left = patience.since + patience.timeout_s - now if patience.timeout_s else patience.poll_s
        time.sleep(min(patience.poll_s, left))


def _ask(client: Client, run_id: str, patience: Patience) -> tuple[Any, dict[str, Any] | None]:
    """Return the run and Argo's workflow; what passes is waited for, longer each time."""
    run = None
    for attempt in range(_TRIES):
        try:
            with quiet():
                run = client.get_run(run_id)
                return run, client.workflow(run_id)
        except ClusterError as error:
            problem: str = str(error)
        except Exception as error:
            problem = explain(error, client.place())
            if is_passing(error) and attempt < _TRIES - 1:
                pause = max(_SHORTEST_PAUSE_S, patience.poll_s) * 2**attempt
                time.sleep(min(_LONGEST_PAUSE_S, pause))
                continue
        break
    if run is not None:
        return run, None  # the older API is the one that is not there
    raise ClusterError(f"{problem} The run goes on: {client.link('runs', run_id)}")


def _progress(run: Any, workflow: Workflow | None) -> Progress:
    state, found = str(run.state or ""), workflow or Workflow()
    was_terminated = found.was_terminated or any(
        past.state in ("CANCELING", "CANCELED") for past in run.state_history or ()
    )
    if state not in _ENDED:
        trouble = None if was_terminated else _why_it_waits(found)
        return Progress(state=state, workflow=workflow, trouble=trouble)
    if state == "CANCELED" or (state == "FAILED" and was_terminated):
        text = f"the run was terminated, by a person or a program. {_RESUMES}."
        return Progress(state=state, workflow=workflow, trouble=Trouble(about="terminated", text=text))
    if state != "FAILED":
        return Progress(state=state, workflow=workflow)
    # finalize runs whatever has failed before it, and may fail for the same reason
    failed = sorted((t for t in found.tasks + found.drivers if t.phase in FAILED), key=_order_of_failure)
    failed = [task for task in failed if "finalize" not in task.name] or failed
    troubles = [_explained(task) for task in failed]
    if not troubles:
        said = found.message or one_line((run.error and run.error.message) or "")
        text = f"the run failed{said and ': '}{said}. Its log is in the UI."
        troubles = [Trouble(about="the run", text=text)]
    taken = all(trouble.about.endswith(_TAKEN) for trouble in troubles)
    return Progress(state=state, workflow=workflow, trouble=troubles[0], was_taken_away=taken)


def _order_of_failure(task: TaskState) -> tuple[float, float]:
    return task.finished, task.started


def _why_it_waits(workflow: Workflow) -> Trouble | None:
    waiting = [task for task in workflow.tasks + workflow.drivers if task.phase == "Pending"]
    slow = [task for task in waiting if time.time() - task.started > _SLOW_S]
    for task in slow:
        if _cause(task.message):
            return _explained(task)
    for task in slow:
        if time.time() - task.started > _LATE_S:
            about = f"{task.name} has waited for over five minutes"
            said = f" ({task.message})" if task.message else ""
            return Trouble(about=about, text=f"{about}{said}. See `kubectl describe pod`.")
    return None


def _explained(task: TaskState) -> Trouble:
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
