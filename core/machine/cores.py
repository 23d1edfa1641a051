"""The number of threads of a process, and how they wait for each other."""

import math
import os
from pathlib import Path

from core.machine.control_groups import PROC, control_groups

_CPUS = Path("/sys/devices/system/cpu")

# Turns that a waiting thread spins before it sleeps: some 10 us, enough for the gaps within a forward pass.
# libgomp's own 300,000 let two processes on the same cores slow each other twentyfold, as each thread spins
# on the core that the thread it waits for needs. With none, a busy machine wakes threads late.
_SPINS = "1000"


def use_own_cores() -> None:
    """Make OpenMP and its users take this process's cores, and sleep soon when they wait.

    Torch, MKL, OpenBLAS and Arrow follow. Variables that are set already stay. Libraries read them when they
    are loaded, so call this before torch is imported; child processes inherit them.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # The policy for LLVM's and Intel's OpenMP, the count for GNU's, which torch on CPUs brings.
        os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": _SPINS})


def usable_cores(cpus: Path = _CPUS, proc: Path = PROC) -> int:
    """Return the number of threads of this process that can compute at once, at least 1.

    These are the physical cores it may run on, limited by the CPU time that its control groups allow, rounded
    down: a thread waits while one that it needs is throttled. (Measured on 2 cores, against two
    threads that spin: 1.31x as fast under a quota of 1 core, 0.83x under 1.5.)

    Args:
        cpus: Where Linux describes the CPUs.
        proc: This process's folder under ``/proc``, which names its control groups.
    """
    quotas = [quota for group in control_groups("cpu", proc) if (quota := _quota(group)) is not None]
    return max(1, math.floor(min([_physical_cores(cpus), *quotas])))


def _physical_cores(cpus: Path) -> int:
    """Return the cores that this process may run on; hyperthreads of one core do not add speed."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    try:
        return len({(cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in allowed})
    except OSError:
        return len(allowed)


def _quota(group: Path) -> float | None:
    """Return the CPU seconds per second of a control group; None without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:  # version 1
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # the root, which has no limit, or "max"
        return None
