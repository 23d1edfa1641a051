"""A run on a cluster on the terminal: a line for each task that starts or ends, and for each trouble."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from core.quantities import seconds_text
from pipelines.remote.following import ENDED, Progress
from pipelines.remote.workflow import FAILED, TaskState

_STYLES = {"Failed": "red", "Error": "red", "FAILED": "red", "Skipped": "dim"}
_NO_WORKFLOW = (
    "this server lacks the older API of Kubeflow Pipelines (v1beta1): only the state of the run is shown. "
    "Its tasks are in the UI."
)
RETRIES = {
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
        self._console, self._phases, self._said = console, dict[str, str](), set[str]()
        self._width = max((len(shown.format("00")) for shown in tasks.values()), default=0)

    def show(self, progress: Progress) -> None:
        """Show the changes."""
        workflow, has_ended = progress.workflow, progress.state in ENDED
        if workflow is None:
            self._say(_NO_WORKFLOW)
            self._note("the run", progress.state, 0.0, progress.state.lower() or "pending")
        elif workflow.tasks or workflow.drivers:  # before, Argo has not added its defaults
            policy = workflow.retry_policy
            self._say(f"retries: {RETRIES.get(policy, 'see Argo')} (Argo's retryPolicy is {policy} here)")
        for task in workflow.tasks if workflow else ():
            if task.phase == "Running" and not has_ended:
                self._note(task.name, task.phase, task.started, "started")
            elif task.phase not in ("Pending", "Running"):
                self._note(task.name, task.phase, task.finished, _end_of(task))
        if progress.trouble and not has_ended:
            self._say(progress.trouble.text, progress.trouble.about)

    def _say(self, text: str, about: str = "") -> None:
        """Print a line, but only one about the same."""
        if (about or text) not in self._said:
            self._said.add(about or text)
            self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def _note(self, name: str, phase: str, moment: float, said: str) -> None:
        """Print the new phase of a task, and when it began."""
        if self._phases.get(name) != phase:
            self._phases[name] = phase
            clock = time.strftime("%H:%M:%S", time.localtime(moment or None))
            line = Text.assemble(
                f"{clock}  ", (f"{name:<{self._width}}", "cyan"), "  ", (said, _STYLES.get(phase, ""))
            )
            self._console.print(line, soft_wrap=True)


def _end_of(task: TaskState) -> str:
    if task.phase == "Skipped":
        return "skipped"
    said = "failed" if task.phase in FAILED else task.phase.lower()
    return f"{said} after {seconds_text(max((task.finished or time.time()) - task.started, 0.0))}"
