"""What a person sees of a local run: our tasks' log lines, a bar on a terminal, and why a task failed.

``kfp.local`` writes everything to stdout: its own log, each task's input as JSON, and what the task itself
prints. All of that goes to a log file; the terminal gets the lines that ``components.runtime`` has written.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from core.redaction import one_line

_TASK_LINE = re.compile(r" *\d\d:\d\d:\d\d ([A-Z]+) (?:phase (\d+) )?([a-z-]+): (.*)")
_KFP_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} - ")
_KFP_FAILURE = re.compile(r"Task \S*'(\S+)'\S* finished with status \S*FAILURE")
_EXECUTOR_LINE = re.compile(r" *\[KFP Executor ")
_ERROR_LINE = re.compile(r" *error: (.*)")
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task that failed.

    Attributes:
        step: What it was, such as ``phase 2/2 recover-train``.
        reason: What it said last.
    """

    step: str
    reason: str


class RunProgress(io.TextIOBase):
    """Takes the place of stdout while ``kfp.local`` runs.

    Attributes:
        steps: Names of the steps that were started, without their phase.
        found_done: How many steps had nothing to do.
        failures: The tasks that failed, in order.
    """

    def __init__(
        self, console: Console, *, phases: int, ended: Callable[[str], None] = lambda step: None
    ) -> None:
        """Show a run of ``phases`` phases on ``console``; tell ``ended`` the name of each step that ends."""
        self.steps: list[str] = []
        self.found_done = 0
        self.failures: list[Failure] = []
        self._console, self._phases, self._ended = console, phases, ended
        self._log: TextIO = io.StringIO()
        self._width = len(self._label(str(phases), "recover-train"))
        self._rest = ""
        self._open = ""  # the step that has started and not yet ended
        self._last = ""  # what it said last
        self._errors: list[str] = []
        self._found = False  # whether it has found its work done
        self._bar = Progress(
            TextColumn(f"{{task.description:<{self._width}}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._all_tasks = self._bar.add_task("starting", total=5 * phases + 6)

    @contextlib.contextmanager
    def reading(self, log: TextIO) -> Iterator[None]:
        """Take the place of stdout; everything that comes also goes to ``log``."""
        self._log = log
        with self._bar, contextlib.redirect_stdout(self):
            try:
                yield
            finally:
                self.write("\n")
                self._fail(self._open)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Take what kfp or a task prints."""
        try:
            self._log.write(text)
            self._log.flush()
        except OSError as error:  # of a full disk; raised here, kfp's logger would print it at every line
            self._console.print(
                Text(f"the log is not written any more: {error}", style="yellow"), soft_wrap=True
            )
            self._log = io.StringIO()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._read(line)
        return len(text)

    def _read(self, line: str) -> None:
        if _KFP_LINE.match(line):
            # kfp speaks again: a task that is open has ended and not said that it is done
            match = _KFP_FAILURE.search(line)
            self._fail(self._open or (match[1] if match else ""))
        elif match := _TASK_LINE.fullmatch(line):
            level, phase, step, message = match.groups()
            self._show(self._label(phase, step), step, level, message.removeprefix(f"phase {phase} {step}: "))
        elif match := _ERROR_LINE.fullmatch(line):
            self._errors.append(match[1])
        elif line.strip() and not _EXECUTOR_LINE.match(line):
            self._last = line.strip()

    def _show(self, label: str, step: str, level: str, message: str) -> None:
        if message == "started":
            self._open, self._last, self._errors, self._found = label, "", [], False
            self.steps.append(step)
            self._bar.update(self._all_tasks, description=label)
            if self._console.is_terminal:
                return
        elif message.startswith("done in "):
            self._open = ""
            self._bar.advance(self._all_tasks)
            self._ended(step)
            if self._found:
                return
        elif message == "already done":
            self.found_done += 1
            self._found = True
        shown = (one_line(message), _STYLES.get(level, ""))
        text = Text.assemble((f"{label:<{self._width}}", "cyan"), "  ", shown)
        self._console.print(text, soft_wrap=True)

    def _fail(self, step: str) -> None:
        if step:
            reason = " ".join(self._errors) or self._last or "it ended without a message"
            if reason == "Killed":  # what the shell says after signal 9
                reason = "the system killed it, most likely for lack of memory"
            self.failures.append(Failure(step=step, reason=reason if reason.endswith(".") else f"{reason}."))
            self._console.print(Text(f"{step:<{self._width}}  failed", style="red"), soft_wrap=True)
        self._open = ""

    def _label(self, phase: str | None, step: str) -> str:
        if phase is None:
            return step
        if phase == "0":
            return f"dense model {step}"
        return f"phase {phase:>{len(str(self._phases))}}/{self._phases} {step}"
