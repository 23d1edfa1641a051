"""Temporary folders, and what killed processes leave of them."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from core.scratch import scratch_folder

HOLDER = """
import sys, time
from pathlib import Path
from core.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").mkdir()
    (folder / "weights" / "large").write_bytes(b"x" * 1000)
    print(folder.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has a folder in ``tmp_path``, which looks old, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    folder = tmp_path / process.stdout.readline().strip()
    os.utime(folder, (1e9, 1e9))
    yield process, folder
    process.kill()
    process.communicate()


def test_it_is_empty_and_goes_with_its_use(tmp_path):
    with scratch_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_the_next_one_removes_what_a_killed_process_has_left(holder, tmp_path):
    process, left = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists()
    with scratch_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_what_is_in_use_stays(holder, tmp_path):
    _, used = holder
    with scratch_folder(tmp_path) as folder:
        assert set(tmp_path.iterdir()) == {folder, used}
        assert (used / "weights" / "large").exists()


def test_what_was_made_just_now_and_what_others_have_made_stays(tmp_path):
    with scratch_folder(tmp_path) as folder:
        name = folder.name.rpartition("-")[0]
    made = {tmp_path / f"{name}-justnow", tmp_path / "adapt-pruner-another.host-old"}
    for other in made:
        other.mkdir()
    os.utime(tmp_path / "adapt-pruner-another.host-old", (1e9, 1e9))
    with scratch_folder(tmp_path) as folder:
        assert set(tmp_path.iterdir()) == {folder, *made}


def test_a_link_is_not_followed(tmp_path):
    with scratch_folder(tmp_path) as folder:
        name = folder.name.rpartition("-")[0]
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    os.utime(elsewhere, (1e9, 1e9))
    (tmp_path / f"{name}-link").symlink_to(elsewhere)
    with scratch_folder(tmp_path):
        assert (elsewhere / "kept").exists()


def test_a_file_system_without_locks_gives_folders_and_loses_none(holder, tmp_path, monkeypatch):
    def without(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    _, used = holder
    with scratch_folder(tmp_path) as folder:
        assert set(tmp_path.iterdir()) == {folder, used}
    assert set(tmp_path.iterdir()) == {used}
