"""The control groups of this process, of version 1 and version 2, where Linux keeps its limits."""

import re
from pathlib import Path

PROC = Path("/proc/self")


def control_groups(controller: str, proc: Path = PROC) -> list[Path]:
    """Return the folders with the limits of this process, its own group first, then those above it.

    A machine may mount both versions; the one without the controller lacks its files. Groups above a
    container's own are visible only as far as the container mounts them.

    Args:
        controller: ``cpu`` or ``memory``.
        proc: The process's folder under ``/proc``.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    # Version 2 is the line without controllers.
    paths = {
        "cgroup" if names else "cgroup2": path
        for _, names, path in groups
        if not names or controller in names.split(",")
    }
    folders = []
    for mount in mounts:
        fields, _, about = mount.partition(" - ")
        kind, _, options = about.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        root, point = (_unescaped(field) for field in fields.split(" ")[3:5])
        folders += _upwards(Path(point), Path(root), Path(paths[kind]))
    return folders


def _upwards(point: Path, root: Path, path: Path) -> list[Path]:
    """Return a group's folder and those above it, down to the mount's own.

    ``root`` is the group mounted at ``point``; it counts unless the process's group ``path`` lies in it.
    """
    below = path.relative_to(root) if path.is_relative_to(root) else Path()
    parts = () if ".." in below.parts else below.parts
    return [point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
