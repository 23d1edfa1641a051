"""What a person sees of a run on a cluster: lines of what started and ended; on a terminal, what runs."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.runs.record import seconds_text
from pipelines.remote.following import Progress
from pipelines.remote.workflow import FAILED, TaskState

_SAYS = {"Pending": "waits", "Running": "started"}
_STYLES = {"Failed": "red", "Error": "red", "FAILED": "red", "Skipped": "dim"}
_NO_WORKFLOW = (
    "Kubeflow Pipelines does not serve its older API (v1beta1) here: only the state of the run is shown. Its "
    "tasks are in the UI."
)
_RETRIES = {
    # Argo's policy to what it means
    "OnFailure": "tasks that fail are tried again, cluster.retries times; a deleted pod ends the run",
    "OnError": "deleted pods are tried again; tasks that fail are not, whatever cluster.retries says",
    "Always": "tasks that fail and deleted pods are tried again, cluster.retries times",
    "OnTransientError": "what Argo takes for a passing error is tried again; other failures are not",
}


class RunView:
    """Shows what has changed since it was shown last."""

    def __init__(self, console: Console, tasks: Mapping[str, str]) -> None:
        """Show a run of ``tasks`` on ``console``."""
        self._console, self._seen, self._told = console, dict[str, str](), set[str]()
        self._width = max((len(shown.format("00")) for shown in tasks.values()), default=0)
        self._live = (
            Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        )

    def __enter__(self) -> "RunView":
        """Start the live part."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the live part."""
        if self._live:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show what is new."""
        workflow = progress.workflow
        if workflow is None:
            self._tell(_NO_WORKFLOW)
            self._note("the run", progress.state, 0.0, progress.state.lower() or "pending")
        elif workflow.tasks or workflow.drivers:  # before, Argo has not added its defaults
            policy = workflow.retry_policy
            self._tell(f"retries: {_RETRIES.get(policy, 'see Argo')} (Argo's retryPolicy is {policy} here)")
        for task in workflow.tasks if workflow else ():
            if task.phase not in _SAYS:
                self._note(task.name, task.phase, task.finished, _said(task))
            elif task.phase == "Running" and not self._live and not progress.has_ended:
                self._note(task.name, task.phase, task.started, _said(task))
        if progress.trouble and not progress.has_ended:
            self._tell(progress.trouble.text, progress.trouble.about)
        if self._live:
            self._live.update(self._table(progress), refresh=True)

    def _tell(self, text: str, about: str = "") -> None:
        """Print a line, but only one of those about the same."""
        if (about or text) not in self._told:
            self._told.add(about or text)
            self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def _note(self, name: str, phase: str, moment: float, said: str) -> None:
        """Print what has become of something, and when."""
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
