"""A tiny run that is killed by SIGKILL at random moments and started again each time, until it ends.

The long test kills the command itself, with all its processes, on a real S3 server; the shorter one kills a
process that calls the steps one after another, which starts in no time and can so be killed more often.
"""

import contextlib
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter

import pytest

from core.storage.interface import join_uri
from core.storage.publication import open_publication
from core.storage.store import open_store
from tests.support.evidence import note
from tests.support.project import MEASURED, command_line, recipe_with, run_all, write_recipe

CHANGES = {
    "training.tokens": "2304",
    "training.save_every": "1 steps",
    "prune.attention_unit": "kv_group",
}
"""Twelve optimizer steps in two phases: kills shall meet the training too."""

ORDER = [
    "data",
    f"held-out-{MEASURED}",
    f"phases/00/evaluated-{MEASURED}",
    *(
        f"phases/0{phase}/{step}"
        for phase in (1, 2)
        for step in ("calibrated", "scored", "pruned", "recovered", f"evaluated-{MEASURED}")
    ),
    "final",
]
"""What a run publishes, in the order of its steps."""

TIMED = {"report.json", "record.json", "report.html"}
"""Files that tell how long something took."""

PRELOAD = ["tests.support.project", "core.steps", "core.training.recover", "core.pruning.planning", "lm_eval"]


def run_in_child(project, store, log_path, environment):
    """Run all steps in this process, which the test kills, and log what is computed."""
    os.environ.update(environment)
    handler = logging.FileHandler(log_path)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    logging.getLogger("core").addHandler(handler)
    logging.getLogger("core").setLevel(logging.DEBUG)
    os.chdir(project)
    run_all(recipe_with({**CHANGES, "storage.store": store}), log_path.parent / "artifacts")


def start(*arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_in_child, args=arguments)
    process.start()
    return process


def computed(log_path):
    """Return how often each publication was computed, by its place in the run."""
    found = re.findall(r"computing \S+?/runs/[0-9a-f]+/(\S+)", log_path.read_text())
    return Counter(found)


def published(store):
    """Return the places of the run that have a manifest."""
    keys = [re.fullmatch("runs/[0-9a-f]+/(.+)/MANIFEST.json", key) for key in open_store(store).list("runs/")]
    return {match[1] for match in keys if match}


def final_uri(store):
    (uri,) = {join_uri(store, *key.split("/")[:2], "final") for key in open_store(store).list("runs/")}
    return uri


def content(uri, scratch):
    """Return the bytes of a publication, less what tells how long something took."""
    folder = open_publication(uri).fetch(scratch)
    paths = [path for path in open_publication(uri).manifest.paths if path not in TIMED]
    return {path: (folder / path).read_bytes() for path in paths}


def orphans(store):
    """Return the keys of a finished store that no manifest claims, but records of runs and kept answers."""
    keys = set(open_store(store).list())
    claimed = set()
    for key in keys:
        place, _, name = key.rpartition("/")
        if name == "MANIFEST.json":
            manifest = open_publication(join_uri(store, place)).manifest
            claimed |= {key, *(f"{place}/{manifest.key(entry)}" for entry in manifest.files)}
    others = re.compile(r"(runs/[0-9a-f]+/(run|DONE)|answers/[0-9a-f]{64})\.json")
    return {key for key in keys - claimed if not others.fullmatch(key)}


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The files that a run leaves which nobody kills, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    process = start(project, str(folder / "store"), folder / "log", {})
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - began
    store = str(folder / "store")
    assert computed(folder / "log") == dict.fromkeys(ORDER, 1)
    return content(final_uri(store), folder / "fetched"), seconds


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["folder", "s3"])
def test_a_run_that_is_killed_at_random_moments_ends_at_the_same_bits(
    project, undisturbed, tmp_path, s3_server, request, backend
):
    expected, seconds = undisturbed
    chance = random.Random(backend)
    kills = runs = 0
    while kills < 50:
        runs += 1
        if backend == "s3":
            store, environment = request.getfixturevalue("s3_store_uri") + f"/{runs}", s3_server.environment()
        else:
            store, environment = str(tmp_path / f"store-{runs}"), {}
        log_path = tmp_path / f"log-{runs}"
        log_path.touch()
        met = Counter()
        while True:
            before, done = computed(log_path), published(store)
            process = start(project, store, log_path, environment)
            # Where a machine has become slower than it was for the undisturbed run, it lives ever longer.
            process.join(chance.uniform(0, (0.5 + 0.05 * max(met.values(), default=0)) * seconds))
            killed = process.is_alive()
            process.kill()
            process.join()
            again = set((computed(log_path) - before).keys()) & done
            assert not again, f"computed twice: {again}"
            if not killed:
                assert process.exitcode == 0, log_path.read_text()[-3000:]
                break
            kills += 1
            met[next((place for place in ORDER if place not in published(store)), "finalize")] += 1
        assert content(final_uri(store), tmp_path / f"fetched-{runs}") == expected
        assert orphans(store) == set()
        for place, times in met.items():
            tried = f"SIGKILL in {step_of(place)}, the steps called one by one ({backend})"
            note("Kills", tried, "went on where it was; same bits, nothing left behind", times)


def step_of(place):
    """Name a step by what it publishes, without the phase."""
    return place.rpartition("/")[2]


@pytest.mark.torture
def test_the_command_that_is_killed_at_random_moments_ends_at_the_same_bits(
    project, undisturbed, tmp_path, s3_server, s3_store_uri
):
    expected, _ = undisturbed
    chance = random.Random(0)
    wanted = int(os.environ.get("ADAPT_PRUNER_KILLS", "50"))
    recipe = write_recipe(project / "killed.yaml", CHANGES)
    kills = runs = 0
    while kills < wanted:
        runs += 1
        store, output = f"{s3_store_uri}/{runs}", tmp_path / f"output-{runs}"
        tracking = f"sqlite:///{tmp_path}/mlflow-{runs}.db"
        arguments = ["run", recipe, f"--set=storage.store={store}", f"--set=tracking.uri={tracking}"]
        command, environment = command_line(*arguments, "--output", output)
        environment |= s3_server.environment()
        met = Counter()
        while True:
            done = published(store)
            (output / "run.log").unlink(missing_ok=True)  # what is killed early leaves that of the try before
            process = subprocess.Popen(
                command,
                cwd=project,
                env=environment,
                start_new_session=True,
                stderr=subprocess.PIPE,
                text=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=chance.uniform(1, 45))
            killed = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log = (output / "run.log").read_text() if (output / "run.log").exists() else ""
            found = re.findall(r"^ *\d\d:\d\d:\d\d INFO (.*): already done$", log, re.MULTILINE)
            begun = re.findall(r"^ *\d\d:\d\d:\d\d INFO (.*): started$", log, re.MULTILINE)
            twice = {task for task in begun[:-1] if place_of(task) in done and task not in found}
            assert not twice, f"computed twice: {twice}"
            if not killed:
                assert process.returncode == 0, log[-3000:]
                break
            kills += 1
            met[re.sub(r"phase \d+ ", "", begun[-1]) if begun else "the start"] += 1
        assert content(final_uri(store), tmp_path / f"fetched-{runs}") == expected
        assert orphans(store) == set()
        for task, times in met.items():
            tried = f"SIGKILL of `adapt-pruner run` in {task} (s3, MLflow)"
            note("Kills", tried, "the same command went on; same bits, nothing left behind", times)


def place_of(task):
    """Return what a task publishes, by its name in the log."""
    names = {
        "calibrate": "calibrated",
        "score-layers": "scored",
        "prune-step": "pruned",
        "recover-train": "recovered",
        "evaluate": f"evaluated-{MEASURED}",
    }
    match = re.fullmatch(r"phase (\d+) (\S+)", task)
    if match:
        return f"phases/{int(match[1]):02d}/{names[match[2]]}"
    return {"prepare-data": f"held-out-{MEASURED}", "publish": "final"}.get(task)
