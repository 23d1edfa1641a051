"""What a person sees of a run on a cluster: lines of what started and ended; on a terminal, what runs."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.record import seconds_text
from pipelines.following import Progress, TaskState

_SAYS = {
    "": "waits",
    "RUNTIME_STATE_UNSPECIFIED": "waits",
    "PENDING": "waits",
    "RUNNING": "started",
    "CANCELING": "is being cancelled",
    "CANCELED": "cancelled",
    "PAUSED": "paused",
}
_WAITS = {state for state, said in _SAYS.items() if said == "waits"}
_STYLES = {"FAILED": "red", "CANCELED": "yellow", "SKIPPED": "dim"}


class RunView:
    """Shows what has changed since it was shown last."""

    def __init__(self, console: Console, tasks: Mapping[str, str]) -> None:
        """Show a run of ``tasks`` on ``console``."""
        self._console, self._seen, self._trouble = console, dict[str, str](), ""
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
        for task in progress.tasks:
            if progress.has_ended and task.state in _WAITS:
                continue  # it will not run
            if self._seen.get(task.name) != task.state:
                self._seen[task.name] = task.state
                if self._live is None or progress.has_ended or task.state not in _SAYS:
                    self._print(task.name, _said(task), _STYLES.get(task.state, ""))
        if progress.trouble != self._trouble and not progress.has_ended:
            self._trouble = progress.trouble
            if progress.trouble:
                self._console.print(Text(progress.trouble, style="yellow"), soft_wrap=True)
        if self._live:
            self._live.update(self._table(progress), refresh=True)

    def _print(self, name: str, said: str, style: str) -> None:
        text = Text.assemble((f"{name:<{self._width}}", "cyan"), "  ", (said, style))
        self._console.print(text, soft_wrap=True)

    def _table(self, progress: Progress) -> Table:
        table = Table(box=None, show_header=False)
        done = sum(task.state in ("SUCCEEDED", "SKIPPED") for task in progress.tasks)
        for task in progress.tasks:
            if task.state in _SAYS:
                table.add_row(task.name, _said(task), seconds_text(task.seconds), task.reason)
        table.add_row(progress.state.lower() or "pending", f"{done} tasks done")
        return table


def _said(task: TaskState) -> str:
    said = _SAYS.get(task.state, task.state.lower())
    if task.state in ("SUCCEEDED", "FAILED"):
        said += f" after {seconds_text(task.seconds)}"
    return said
