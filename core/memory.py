"""How much memory there is, and what may be done with it."""

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: str | torch.device = "cpu", cgroup: Path = _CGROUP) -> int:
    """Return the free memory of an accelerator, or of the host within its container's limit.

    Args:
        device: Whose memory.
        cgroup: Where the container's control group is mounted (version 2).
    """
    device = torch.device(device)
    if device.type == "cuda":
        # What PyTorch keeps of memory that it has freed is not free to the driver, but it is to us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, no limit ("max"), or control groups of version 1
        return free
    # Pages of files that the kernel can drop count as used.
    return min(free, limit - used + int(statistics.get("inactive_file", 0)))
