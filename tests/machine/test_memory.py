import psutil
import pytest
import torch

from core.machine.memory import available_bytes
from tests.support.groups import proc_with

FILES = {
    2: {"memory.max": 1000, "memory.current": 700, "memory.stat": "anon 400\ninactive_file 250"},
    1: {
        "memory.limit_in_bytes": 1000,
        "memory.usage_in_bytes": 700,
        "memory.stat": "inactive_file 7\ntotal_inactive_file 250",
    },
}
UNLIMITED = {2: {"memory.max": "max"}, 1: {"memory.limit_in_bytes": 9223372036854771712}}


def tree(folder, version, groups):
    return proc_with(
        folder,
        version,
        {f"{group}/{name}": text for group, files in groups.items() for name, text in files.items()},
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_bounds_what_is_free(tmp_path, version):
    proc = tree(tmp_path, version, {"pod/task": FILES[version], "pod": FILES[version] | UNLIMITED[version]})
    assert available_bytes("cpu", proc) == 1000 - 700 + 250


@pytest.mark.parametrize("version", [1, 2])
def test_a_pods_limit_bounds_its_containers(tmp_path, version):
    proc = tree(tmp_path, version, {"pod/task": FILES[version] | UNLIMITED[version], "pod": FILES[version]})
    assert available_bytes("cpu", proc) == 1000 - 700 + 250


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_the_machine_counts(tmp_path, monkeypatch, version):
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    proc = tree(tmp_path, version, {"pod/task": FILES[version] | UNLIMITED[version]})
    assert available_bytes("cpu", proc) == machine.available


def test_without_control_groups_the_machine_counts(tmp_path, monkeypatch):
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert available_bytes("cpu", tmp_path / "none") == machine.available


def test_what_pytorch_keeps_of_an_accelerators_memory_is_free(monkeypatch):
    """10 GB, of which PyTorch has taken 7 and uses 2, and other processes 1."""
    figures = {"mem_get_info": (2 * 10**9, 10 * 10**9), "memory_reserved": 7 * 10**9}
    for name, value in {**figures, "memory_allocated": 2 * 10**9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_bytes("cuda") == 7 * 10**9
