"""Free memory, used memory, and the way from the host to an accelerator."""

import gc
import resource
from pathlib import Path

import psutil
import torch
from torch import Tensor

from core.machine.control_groups import PROC, control_groups


def available_bytes(device: str | torch.device = "cpu", proc: Path = PROC) -> int:
    """Return the free memory of an accelerator, or of the host within its container's limits.

    Args:
        device: Whose memory.
        proc: This process's folder under ``/proc``, which names its control groups.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # Memory that PyTorch has freed but keeps is free to us, though not to the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = int(psutil.virtual_memory().available)
    return min(
        [free, *(left for group in control_groups("memory", proc) if (left := _left(group)) is not None)]
    )


def peak_bytes(device: str | torch.device = "cpu") -> int:
    """Return the most memory that was taken at once: of an accelerator by PyTorch, of the host by us."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spare_bytes() -> int:
    """Return the host's free memory, less what this process once took and may take again."""
    return available_bytes() - max(0, peak_bytes() - psutil.Process().memory_info().rss)


def free_unused() -> None:
    """Give back what nothing holds any more, also what torch keeps of an accelerator's memory."""
    gc.collect()
    torch.cuda.empty_cache()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; what goes from the host to an accelerator arrives while both work on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # out of other memory it would wait for all that the GPU has to do
    return tensor.to(device, non_blocking=True)


def _left(group: Path) -> int | None:
    """Return the bytes that a control group may still take; None without a limit."""
    # Cached pages of files, which the kernel can drop, count as used.
    if (group / "memory.max").exists():
        limit, used, droppable = "memory.max", "memory.current", "inactive_file"
    else:  # version 1
        limit, used, droppable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / used).read_text()) - int(statistics.get(droppable, 0))
        return int((group / limit).read_text()) - taken
    except (OSError, ValueError):  # the root, which has no limit, or "max"
        return None
