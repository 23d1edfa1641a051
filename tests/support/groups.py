"""Trees of control groups for tests, with what names them under /proc."""


def proc_with(folder, version, files, path="/pod/task"):
    """A process's folder under /proc, in the group ``path``; ``files`` maps a group's file to its content."""
    mount = folder / "mount"
    for name, content in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{content}\n")
    if version == 1:
        names = {name.rpartition("/")[2].partition(".")[0] for name in files}
        (controller,) = names & {"cpu", "memory"}
        (folder / "cgroup").write_text(f"4:{controller}:{path}\n0::/\n")
        (folder / "mountinfo").write_text(f"40 31 0:29 / {mount} rw - cgroup cgroup rw,{controller}\n")
    else:
        (folder / "cgroup").write_text(f"0::{path}\n")
        (folder / "mountinfo").write_text(f"40 31 0:29 / {mount} rw - cgroup2 cgroup2 rw\n")
    return folder
