"""How many threads a process should have, and how they wait for each other."""

import math
import os
from pathlib import Path

from core.control_groups import PROC, control_groups

_CPUS = Path("/sys/devices/system/cpu")


def use_own_cores() -> None:
    """Let OpenMP, and what follows its settings, use this process's cores and wait without spinning.

    Torch, MKL, OpenBLAS and Arrow follow. What the environment says already stays. They read it when they are
    loaded, so call this before torch is imported; processes that are started later inherit it.
    """
    # A thread that spins while it waits takes its core from the thread that it waits for, as soon as there
    # are more threads than cores: two such processes are enough, and both come to a crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def usable_cores(cpus: Path = _CPUS, proc: Path = PROC) -> int:
    """Return how many threads of this process can compute at once, at least 1.

    These are the physical cores that it may run on, but no more than the CPU time that its control groups
    allow, rounded up.

    Args:
        cpus: Where Linux describes the CPUs.
        proc: This process's folder under ``/proc``, which names its control groups.
    """
    quotas = [quota for group in control_groups("cpu", proc) if (quota := _quota(group)) is not None]
    return max(1, math.ceil(min([_physical_cores(cpus), *quotas])))


def _physical_cores(cpus: Path) -> int:
    """Return the cores that this process may run on; the two hyperthreads of one do not compute faster."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    try:
        return len({(cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in allowed})
    except OSError:
        return len(allowed)


def _quota(group: Path) -> float | None:
    """Return the CPU seconds that a control group has each second; None without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:  # version 1
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # the root, which has no limit, or "max"
        return None
