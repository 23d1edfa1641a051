"""A run on a cluster on the terminal: a line for each task that starts or ends, and the tasks in progress."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.runs.record import seconds_text
from pipelines.remote.following import ENDED, Progress
from pipelines.remote.workflow import FAILED, TaskState

_SAYS = {"Pending": "waits", "Running": "started"}
_STYLES = {"Failed": "red", "Error": "red", "FAILED": "red", "Skipped": "dim"}
_NO_WORKFLOW = (
    "this server lacks the older API of Kubeflow Pipelines (v1beta1): only the state of the run is shown. "
    "Its tasks are in the UI."
)
_RETRIES = {
    # Argo's policy and its meaning
    "OnFailure": "failed tasks are retried, cluster.retries times; a deleted pod ends the run",
    "OnError": "deleted pods are retried; failed tasks are not, whatever cluster.retries says",
    "Always": "failed tasks and deleted pods are retried, cluster.retries times",
    "OnTransientError": "errors that Argo takes for transient are retried; other failures are not",
}


class RunView:
    """Shows the changes since the last call."""

    def __init__(self, console: Console, tasks: Mapping[str, str]) -> None:
        """Show a run of ``tasks`` on ``console``."""
        self._console, self._seen, self._said = console, dict[str, str](), set[str]()
        self._width = max((len(shown.format("00")) for shown in tasks.values()), default=0)
        self._live = (
            Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        )

    def __enter__(self) -> "RunView":
        """Start the live part."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the live part."""
        if self._live:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show the changes."""
        workflow = progress.workflow
        if workflow is None:
            self._say(_NO_WORKFLOW)
            self._note("the run", progress.state, 0.0, progress.state.lower() or "pending")
        elif workflow.tasks or workflow.drivers:  # before, Argo has not added its defaults
            policy = workflow.retry_policy
            self._say(f"retries: {_RETRIES.get(policy, 'see Argo')} (Argo's retryPolicy is {policy} here)")
        for task in workflow.tasks if workflow else ():
            if task.phase not in _SAYS:
                self._note(task.name, task.phase, task.finished, _said(task))
            elif task.phase == "Running" and not self._live and progress.state not in ENDED:
                self._note(task.name, task.phase, task.started, _said(task))
        if progress.trouble and progress.state not in ENDED:
            self._say(progress.trouble.text, progress.trouble.about)
        if self._live:
            self._live.update(self._table(progress), refresh=True)

    def _say(self, text: str, about: str = "") -> None:
        """Print a line, but only one about the same."""
        if (about or text) not in self._said:
            self._said.add(about or text)
            self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def _note(self, name: str, phase: str, moment: float, said: str) -> None:
        """Print the new phase of a task, and when it began."""
        if self._seen.get(name) != phase:
            self._seen[name] = phase
            clock = time.strftime("%H:%M:%S", time.localtime(moment or None))
            line = Text.assemble(
                f"{clock}  ", (f"{name:<{self._width}}", "cyan"), "  ", (said, _STYLES.get(phase, ""))
            )
            self._console.print(line, soft_wrap=True)

    def _table(self, progress: Progress) -> Table:
        table = Table(box=None, show_header=False)
        tasks = progress.workflow.tasks if progress.workflow else ()
        for task in tasks:
            if task.phase in _SAYS:
                table.add_row(task.name, _said(task), seconds_text(_seconds(task)), task.message)
        done = sum(task.phase in ("Succeeded", "Skipped") for task in tasks)
        table.add_row(progress.state.lower() or "pending", f"{done} tasks done")
        return table


def _said(task: TaskState) -> str:
    if task.phase in _SAYS or task.phase == "Skipped":
        return _SAYS.get(task.phase, "skipped")
    said = "failed" if task.phase in FAILED else task.phase.lower()
    return f"{said} after {seconds_text(_seconds(task))}"


def _seconds(task: TaskState) -> float:
    return max((task.finished or time.time()) - task.started, 0.0)
