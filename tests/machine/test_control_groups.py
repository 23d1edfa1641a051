import pytest

from core.machine.control_groups import control_groups


@pytest.fixture
def proc(tmp_path):
    """Writes what /proc/self holds of control groups; FOLDER stands for the test's own."""

    def write(groups, mounts):
        (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        mounts = [line.replace("FOLDER", str(tmp_path).replace(" ", r"\040")) for line in mounts]
        (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
        return tmp_path

    return write


VERSION_2 = "31 23 0:27 / FOLDER/fs rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", "23 22 0:5 / /proc rw - proc proc rw"]


def test_version_2_gives_the_group_and_all_above_it(proc):
    folder = proc(["0::/kubepods/pod7/task"], [*OTHERS, VERSION_2])
    above = ["fs/kubepods/pod7/task", "fs/kubepods/pod7", "fs/kubepods", "fs"]
    assert control_groups("cpu", folder) == [folder / path for path in above]


def test_a_container_with_a_namespace_of_its_own_sees_the_root(proc):
    folder = proc(["0::/"], [VERSION_2])
    assert control_groups("memory", folder) == [folder / "fs"]


def test_version_1_gives_each_controller_its_own_hierarchy(proc):
    folder = proc(
        ["12:memory:/a/b", "5:cpu,cpuacct:/c", "3:cpuset:/d", "1:name=systemd:/e"],
        [
            "40 31 0:29 / FOLDER/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
            "41 31 0:30 / FOLDER/cpuset rw - cgroup cgroup rw,cpuset",
            "42 31 0:32 / FOLDER/memory rw master:3 - cgroup none rw,memory",
            "43 31 0:33 / FOLDER/systemd rw - cgroup cgroup rw,name=systemd",
        ],
    )
    assert control_groups("cpu", folder) == [folder / "cpu,cpuacct/c", folder / "cpu,cpuacct"]
    assert control_groups("memory", folder) == [
        folder / name for name in ("memory/a/b", "memory/a", "memory")
    ]


def test_a_container_that_mounts_its_own_group_of_version_1_counts_from_there(proc):
    """Docker without a namespace for control groups: the names are the host's, the mount is not."""
    mounts = ["42 31 0:32 /docker/f00 FOLDER/memory ro - cgroup cgroup rw,memory"]
    folder = proc(["9:memory:/docker/f00"], mounts)
    assert control_groups("memory", folder) == [folder / "memory"]
    folder = proc(["9:memory:/docker/f00/inner"], mounts)
    assert control_groups("memory", folder) == [folder / "memory/inner", folder / "memory"]


@pytest.mark.parametrize("path", ["/../../elsewhere", "/another"])
def test_a_group_outside_of_the_mount_leaves_the_mounts_own(proc, path):
    folder = proc([f"0::{path}"], [VERSION_2.replace(" / ", " /mine ", 1)])
    assert control_groups("cpu", folder) == [folder / "fs"]


def test_both_versions_at_once(proc):
    folder = proc(["4:cpu:/x", "0::/y"], [VERSION_2, "40 31 0:29 / FOLDER/cpu rw - cgroup cgroup rw,cpu"])
    assert set(control_groups("cpu", folder)) == {folder / name for name in ("fs/y", "fs", "cpu/x", "cpu")}


def test_a_mount_point_with_a_space_in_it(tmp_path, proc):
    folder = proc(["0::/"], [r"31 23 0:27 / /mnt/control\040groups rw - cgroup2 cgroup2 rw"])
    assert [str(path) for path in control_groups("cpu", folder)] == ["/mnt/control groups"]


def test_without_control_groups_there_are_none(tmp_path, proc):
    assert control_groups("cpu", tmp_path / "none") == []
    assert control_groups("cpu", proc([], OTHERS)) == []
