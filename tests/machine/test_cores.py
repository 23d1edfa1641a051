import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from core.machine.cores import usable_cores, use_own_cores
from tests.support.groups import proc_with

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cpus(tmp_path, monkeypatch):
    """Eight CPUs on four physical cores: 0 and 4 share the first, and so on. The process may use all."""
    for cpu in range(8):
        folder = tmp_path / f"sys/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    return tmp_path / "sys"


def test_hyperthreads_of_a_core_count_once(cpus, tmp_path):
    assert usable_cores(cpus, tmp_path / "none") == 4


@pytest.mark.parametrize(("allowed", "cores"), [({0, 4}, 1), ({0, 1}, 2), ({1, 2, 5}, 2), ({7}, 1)])
def test_affinity_leaves_its_cores(cpus, tmp_path, monkeypatch, allowed, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    assert usable_cores(cpus, tmp_path / "none") == cores


def test_without_a_description_of_the_cores_cpus_count(cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 4, 9})
    assert usable_cores(cpus, tmp_path / "none") == 3


VERSION_2 = [
    ({"pod/task/cpu.max": "max 100000", "pod/cpu.max": "max 100000"}, 4),
    ({"pod/task/cpu.max": "200000 100000"}, 2),
    ({"pod/task/cpu.max": "150000 100000"}, 1),
    ({"pod/task/cpu.max": "100000 100000"}, 1),
    ({"pod/task/cpu.max": "10000 100000"}, 1),
    ({"pod/task/cpu.max": "75000 25000"}, 3),
    ({"pod/task/cpu.max": "9600000 100000"}, 4),
    ({"pod/task/cpu.max": "max 100000", "pod/cpu.max": "100000 100000"}, 1),
    ({"pod/task/cpu.max": "100000 100000", "pod/cpu.max": "300000 100000"}, 1),
    ({"pod/task/cpu.max": "300000 100000", "cpu.max": "200000 100000"}, 2),
    ({"pod/task/memory.max": "1"}, 4),
    ({"pod/task/cpu.max": "gibberish"}, 4),
]


@pytest.mark.parametrize(("files", "cores"), VERSION_2)
def test_quotas_of_version_2_at_every_level(cpus, tmp_path, files, cores):
    assert usable_cores(cpus, proc_with(tmp_path, 2, files)) == cores


@pytest.mark.parametrize(
    ("own", "above", "cores"),
    [(-1, -1, 4), (200_000, -1, 2), (150_000, -1, 1), (-1, 100_000, 1), (300_000, 200_000, 2), (1000, -1, 1)],
)
def test_quotas_of_version_1_at_every_level(cpus, tmp_path, own, above, cores):
    files = {"pod/task/cpu.cfs_quota_us": own, "pod/cpu.cfs_quota_us": above}
    files |= {f"{group}cpu.cfs_period_us": 100_000 for group in ("pod/task/", "pod/", "")}
    assert usable_cores(cpus, proc_with(tmp_path, 1, files)) == cores


NAMES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)


def environment(**settings):
    return {k: v for k, v in os.environ.items() if k not in NAMES} | {"PYTHONPATH": str(ROOT)} | settings


@pytest.mark.parametrize(
    ("own", "policy", "spins"),
    [
        ({}, "PASSIVE", "1000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None),
        ({"GOMP_SPINCOUNT": "77"}, None, "77"),
        ({"KMP_BLOCKTIME": "5"}, None, None),
    ],
)
def test_a_users_way_of_waiting_stays_whole(monkeypatch, own, policy, spins):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as restored:
        restored.setattr(os, "environ", dict(os.environ))
        use_own_cores()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
        assert os.environ.get("GOMP_SPINCOUNT") == spins
        assert os.environ["OMP_NUM_THREADS"] == str(usable_cores())


def test_a_users_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    use_own_cores()
    assert os.environ["OMP_NUM_THREADS"] == "7"


MORE = min(2, psutil.cpu_count(logical=False) or 1)  # MKL takes no more than there are
TASK = """
from components.runtime import task
with task("calibrate"):
    import torch
    print(torch.get_num_threads())
"""
COMMAND = """
import click, sys
from pipelines import cli

@click.command()
def threads():
    assert "torch" not in sys.modules
    import torch
    print(torch.get_num_threads())

cli.main.add_command(threads)
cli.main(["threads"])
"""


@pytest.mark.parametrize("entry", [TASK, COMMAND], ids=["task", "command"])
@pytest.mark.parametrize(
    ("settings", "threads", "spins"),
    [
        ({}, 1, "1000"),  # on one CPU of this machine
        ({"OMP_NUM_THREADS": "2"}, MORE, "1000"),
        ({"MKL_NUM_THREADS": "2"}, MORE, "1000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 1, "30000000000"),
        ({"GOMP_SPINCOUNT": "77"}, 1, "77"),
    ],
)
def test_torch_gets_what_a_task_and_a_command_have_set(entry, settings, threads, spins):
    """OpenMP prints how long its threads spin when torch loads it."""
    cpu = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cpu}}})\n{entry}"],
        env=environment(OMP_DISPLAY_ENV="VERBOSE", **settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(threads)]
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr or "GOMP" not in done.stderr
    assert settings or "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
