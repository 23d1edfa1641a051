"""How many threads a process should have, and how they wait for each other."""

import math
import os
from pathlib import Path

from core.machine.control_groups import PROC, control_groups

_CPUS = Path("/sys/devices/system/cpu")

# Turns that a waiting thread spins before it sleeps: some 10 us, enough for the gaps within a forward pass.
# libgomp's own 300,000 let two processes on the same cores slow each other twentyfold, as each thread spins
# on the core that the thread it waits for needs. Without any, a busy machine wakes threads late.
_SPINS = "1000"


def use_own_cores() -> None:
    """Let OpenMP, and what follows its settings, use this process's cores and soon sleep where it waits.

    Torch, MKL, OpenBLAS and Arrow follow. What the environment says already stays. They read it when they are
    loaded, so call this before torch is imported; processes that are started later inherit it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # The policy for LLVM's and Intel's OpenMP, the count for GNU's, which torch on CPUs brings.
        os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": _SPINS})


def usable_cores(cpus: Path = _CPUS, proc: Path = PROC) -> int:
    """Return how many threads of this process can compute at once, at least 1.

    These are the physical cores that it may run on, but no more than the CPU time that its control groups
    allow, rounded down: a thread waits while the one it needs is throttled. (Measured on 2 cores, against two
    threads that spin: 1.31x as fast under a quota of 1 core, 0.83x under 1.5.)

    Args:
        cpus: Where Linux describes the CPUs.
        proc: This process's folder under ``/proc``, which names its control groups.
    """
    quotas = [quota for group in control_groups("cpu", proc) if (quota := _quota(group)) is not None]
    return max(1, math.floor(min([_physical_cores(cpus), *quotas])))


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
