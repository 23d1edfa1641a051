import pytest
import torch

from core.memory import available_bytes


@pytest.fixture
def cgroup(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 250000\n")
    return tmp_path


def test_a_containers_limit_bounds_what_is_free(cgroup):
    assert available_bytes("cpu", cgroup) == 1_000_000 - 700_000 + 250_000


def test_without_a_limit_the_machine_counts(cgroup):
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes("cpu", cgroup) > 2**24


def test_without_control_groups_the_machine_counts(tmp_path):
    assert available_bytes("cpu", tmp_path / "none") > 2**24


def test_what_pytorch_keeps_of_an_accelerators_memory_is_free(monkeypatch):
    """10 GB, of which PyTorch has taken 7 and uses 2, and other processes 1."""
    figures = {"mem_get_info": (2 * 10**9, 10 * 10**9), "memory_reserved": 7 * 10**9}
    for name, value in {**figures, "memory_allocated": 2 * 10**9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_bytes("cuda") == 7 * 10**9
