"""The output folder of a run on this machine: one command at a time, and where its links lead."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import LeaseError
from core.storage.publication import publish
from pipelines.local.folders import holding_folder
from pipelines.local.run import fetch_results
from tests.support.evidence import note
from tests.support.project import ROOT, command_line, recipe_with, run_all, write_recipe
from tests.support.servers import killed_at_the_end

CHANGES = {"prune.phases": 1, "training.tokens": "0", "training.sources": []}


@pytest.fixture
def folder(folder):
    """The tiny project with a recipe of one phase."""
    write_recipe(folder / "recipe.yaml", CHANGES)
    return folder


def start(*options):
    line, environment = command_line("run", "recipe.yaml", *options)
    return subprocess.Popen(
        line,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_second_command_into_the_same_folder_is_refused_and_the_first_goes_on(folder):
    run_all(recipe_with(CHANGES), folder / "artifacts")  # done before: the first command has three tasks left
    log, deadline = Path("output/recipe/run.log"), time.monotonic() + 120
    with killed_at_the_end(start()) as first:
        while not (log.exists() and "INFO resolve-base: started" in log.read_text()):
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Another target in another store is a run of its own: there is no common lease.
        for options in ((), ("--set=prune.target=70%", "--set=storage.store=other")):
            with killed_at_the_end(start(*options)) as second:
                stdout, stderr = second.communicate(timeout=120)
            assert (second.returncode, stdout) == (1, "")
            holder = rf"process {first.pid} on \S+ since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
            advice = r"Wait until that has ended, or give another --output\."
            assert re.fullmatch(rf"error: --output=output/recipe is in use by {holder}. {advice}\n", stderr)
        _, stderr = first.communicate(timeout=300)
        assert first.returncode == 0, stderr
    assert log.read_text().count("INFO resolve-base: started") == 1
    assert "INFO finalize: done" in log.read_text()
    assert Path("output/recipe/report.html").is_file()
    note(
        "Leases and cleaning",
        "adapt-pruner run twice into one folder",
        "the second: exit 1, told who holds it",
    )


HOLD = """
import subprocess, sys, time
from pathlib import Path
from pipelines.local.folders import holding_folder
with holding_folder(Path(sys.argv[1]), "x"):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_dead_owner_blocks_nobody_even_if_a_process_that_it_started_lives_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        refused = pytest.raises(LeaseError, match=f"in use by process {process.pid} ")
        with refused, holding_folder(tmp_path, "--output=o"):
            pytest.fail("two hold the same folder")
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        for _ in range(2):  # given back at the end of a block, too
            with holding_folder(tmp_path, "--output=o"):
                assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        process.kill()
        process.communicate()
        os.kill(child, signal.SIGKILL)


def test_the_link_to_the_base_leads_to_a_folder_whose_address_is_percent_encoded(folder):
    published = folder / "published models" / "base"
    publish(folder / "base", str(published))
    recipe = recipe_with({**CHANGES, "model.base": published.as_uri()})
    assert "%20" in published.as_uri()
    handle, _ = run_all(recipe, folder / "artifacts")
    (folder / "output").mkdir()
    fetch_results(handle, folder / "output")
    assert (folder / "output" / "base").resolve() == published
    assert (folder / "output" / "model" / "config.json").is_file()


def test_no_link_leads_to_the_model_of_an_earlier_run(folder, s3_store_uri):
    output = folder / "output"
    output.mkdir()
    handle, _ = run_all(recipe_with(CHANGES), folder / "artifacts")
    fetch_results(handle, output)
    assert (output / "model").is_symlink()
    away, _ = run_all(recipe_with({**CHANGES, "storage.store": s3_store_uri}), folder / "artifacts")
    fetch_results(away, output)
    assert not (output / "model").is_symlink()
    (output / "model").mkdir()
    fetch_results(handle, output)
    assert (output / "model").is_dir()
    assert not (output / "model").is_symlink(), "what is no link of ours stays"
