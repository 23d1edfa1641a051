"""Who works on a run: an execution, its machine and, of a local run, the process that it lives in."""

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

LOCAL = "ADAPT_PRUNER_LOCAL"
"""Environment variable by which a local run tells its tasks the id of its process."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")
_ENDED = ("Z", "X")  # a killed process that nobody has waited for still has its id


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The holder of a lease."""

    job: str
    """The execution, such as the id of a pipeline job: all its tasks are one owner."""
    host: str
    """Name of the machine or pod that has spoken for it last."""
    machine: str
    """Equal where process ids mean the same processes: the start of the kernel and the process namespace."""
    pid: int | None = None
    """Process that the whole execution lives in; None where its tasks live on their own, as in a cluster."""
    started: str = ""
    """When that process was started: its id may be given to another one later."""

    def __post_init__(self) -> None:
        """Refuse what would garble an error's line, or is not a process id."""
        if not all(text.isprintable() for text in (self.job, self.host, self.machine, self.started)):
            raise ValueError("an entry is not a line of text")
        if self.pid is not None and not 0 < self.pid < 2**31:
            raise ValueError("pid is not a process id")

    @classmethod
    def of(cls, job: str, *, pid: int | None = None) -> "Owner":
        """Return an execution on this machine.

        Args:
            job: The execution.
            pid: Its process; None for the one that ``ADAPT_PRUNER_LOCAL`` names, if any.
        """
        if pid is None and (named := os.environ.get(LOCAL, "")).isdecimal():
            pid = int(named)
        started = _state(pid)[1] if pid else ""
        return cls(job=job, host=socket.gethostname(), machine=_machine(), pid=pid, started=started)

    def is_gone(self) -> bool:
        """Return whether its process is known to have ended; never of one on another machine."""
        if self.pid is None or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        state, started = _state(self.pid)
        return state in _ENDED or (started != "" and started != self.started)

    def __str__(self) -> str:
        """Return what an error calls it."""
        process = f", process {self.pid}" if self.pid else ""
        return f"job {self.job} on {self.host}{process}"


def _machine() -> str:
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink(_PROCESSES)}"
    except OSError:  # no Linux: no process namespaces either, but host names may be equal
        return f"{uuid.getnode():012x}"


def _state(pid: int) -> tuple[str, str]:
    """Return the state of a process, Z or X if it has ended, and its start; "" if that is hidden."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]  # its start in ticks of the kernel: setting the clock changes nothing
    except (OSError, IndexError):
        return _state_by_psutil(pid)


def _state_by_psutil(pid: int) -> tuple[str, str]:
    import psutil

    if not psutil.pid_exists(pid):
        return "X", ""
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return ("Z" if ended else "R"), f"{process.create_time():.0f}"
    except psutil.Error:  # a process of another user may be hidden
        return "R", ""
