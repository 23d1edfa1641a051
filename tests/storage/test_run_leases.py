"""The lease of a real run, from its first step to ``finalize``."""

import contextlib
import json
import os
import subprocess

import pytest

from core.errors import LeaseError
from core.runs.run import Run
from core.steps.finalize import run_finalize
from core.steps.needs_run import run_needs_run
from core.steps.prepare_data import run_prepare_data
from core.storage.lease import read_lease, release_lease, take_lease
from core.storage.owner import LOCAL, Owner
from core.storage.publication import find_publication
from tests.support.evidence import note
from tests.support.project import NO_TRAINING, command_line, recipe_with, resolve, run_all, write_recipe


@pytest.fixture
def recipe(store, project):
    with contextlib.chdir(project):
        yield recipe_with(NO_TRAINING | {"storage.store": store.uri})


def test_a_second_local_execution_of_a_run_is_refused_and_the_first_is_not_disturbed(
    recipe, store, monkeypatch
):
    handle, base_uri = resolve(recipe, job="first")
    assert handle == {"store": store.uri, "key": handle["key"], "job": "first"}
    monkeypatch.setenv(LOCAL, str(os.getpid()))
    with pytest.raises(LeaseError, match="job first on "):
        resolve(recipe, job="second")
    monkeypatch.delenv(LOCAL)
    assert sorted(store.list("jobs/")) == ["jobs/first.json"]
    run_finalize(store=store.uri, job="second", succeeded=False)  # what its exit handler does
    assert read_lease(store, f"runs/{handle['key']}").owner.job == "first"
    resolve(recipe, job="first")  # a task that is tried again
    assert run_needs_run(run=handle, being_done_by="").phase
    assert find_publication(run_prepare_data(run=handle, base_uri=base_uri)) is not None


def test_a_step_whose_run_was_taken_over_computes_nothing(recipe, store):
    handle, base_uri = resolve(recipe, job="first")
    folder = f"runs/{handle['key']}"
    release_lease(store, folder, "first")
    other, _ = resolve(recipe, job="second")
    with pytest.raises(LeaseError, match="job second"):
        run_prepare_data(run=handle, base_uri=base_uri)
    assert find_publication(Run.load(handle).uri("data")) is None
    run_finalize(store=store.uri, job="first", succeeded=False)
    assert read_lease(store, folder).owner.job == "second"
    data_uri = run_prepare_data(run=other, base_uri=base_uri)
    assert run_prepare_data(run=handle, base_uri=base_uri) == data_uri  # published: nothing to compute


def test_a_failed_run_gives_its_lease_back(recipe, store):
    handle, _ = resolve(recipe, job="first")
    run_finalize(store=store.uri, job="first", succeeded=False)
    assert not [key for key in store.list() if "/_lease/" in key]
    assert list(store.list("jobs/")) == []
    assert resolve(recipe, job="second")[0]["key"] == handle["key"]


def test_a_run_that_waited_too_long_is_found_by_its_finalize_again(recipe, store):
    handle, base_uri = resolve(recipe, job="first")
    store.delete(f"runs/{handle['key']}/_lease/0001.json")  # what cleaning does to an expired one
    store.delete("jobs/first.json")
    run_prepare_data(run=handle, base_uri=base_uri)
    assert json.loads(store.read_bytes("jobs/first.json")) == {"format": 1, **handle}
    assert read_lease(store, f"runs/{handle['key']}").owner.job == "first"


def test_a_run_that_is_done_needs_no_lease(recipe, store, tmp_path):
    handle, _ = run_all(recipe, tmp_path, job="first")
    folder = f"runs/{handle['key']}"
    take_lease(store, folder, Owner.of("somebody"))
    again, _ = resolve(recipe, job="second")
    assert not run_needs_run(run=again, being_done_by="").phase
    run_finalize(store=store.uri, job="second", succeeded=True)
    assert read_lease(store, folder).owner.job == "somebody"
    assert list(store.list("jobs/")) == []


def test_the_command_stops_at_a_run_that_another_execution_works_on(project, tmp_path):
    changes = NO_TRAINING | {"storage.store": str(tmp_path / "store")}
    with contextlib.chdir(project):
        resolve(recipe_with(changes), job="first")
    recipe = write_recipe(tmp_path / "recipe.yaml", changes)
    line, environment = command_line("run", recipe, "--output", tmp_path / "output")
    done = subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is worked on by job first on" in error
    note(
        "Leases and cleaning",
        "adapt-pruner run of a run that another execution works on",
        "exit 1 and one error line",
    )
