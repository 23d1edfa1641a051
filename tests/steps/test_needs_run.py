"""What needs-run finds left, of stores in every state that a run can leave."""

import contextlib

import pytest

from core.runs.run import Run
from core.steps.frame import tracker_of
from core.steps.needs_run import Left, run_needs_run
from core.storage.publication import MANIFEST, publish
from core.storage.store import open_store
from core.tracking.client import connect
from tests.support.project import NO_TRAINING, recipe_with, resolve

PHASES = 3


@pytest.fixture(scope="module")
def done(project, tmp_path_factory):
    """A run of three phases that has done everything but to publish: its store has all manifests."""
    folder = tmp_path_factory.mktemp("needs-run")
    changes = {
        "storage.store": str(folder / "store"),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "prune.phases": PHASES,
    }
    with contextlib.chdir(project):
        handle, _ = resolve(recipe_with(NO_TRAINING | changes))
    run, content = Run.load(handle), folder / "content"
    content.mkdir()
    (content / "report.json").write_text("{}")
    made = {(0, "hold-out"): run.held_out_uri(), (0, "prepare-data"): run.uri("data")}
    made |= {(phase, "evaluate"): run.measured_uri(phase) for phase in range(PHASES + 1)}
    steps = {"calibrate": "calibrated", "score-layers": "scored", "prune-step": "pruned"}
    made |= {
        (phase, step): run.phase_uri(phase, place)
        for phase in range(1, PHASES + 1)
        for step, place in steps.items()
    }
    tracker = tracker_of(run)
    for (phase, step), uri in made.items():
        with tracker.child(phase, step):
            publish(content, uri)
    return run


@contextlib.contextmanager
def without(run, *places):
    """Take manifests away while the block runs."""
    store = open_store(run.store)
    keys = [f"{run.folder}{place.removeprefix(run.uri())}/{MANIFEST}" for place in places]
    kept = {key: store.read_bytes(key) for key in keys}
    try:
        for key in kept:
            store.delete(key)
        yield
    finally:
        for key, content in kept.items():
            store.write_bytes(key, content)


def left(run):
    return run_needs_run(run=run.handle(), being_done_by="")


def test_the_first_phase_with_work_is_the_one_that_lacks_a_step(done):
    pruned, data = [done.phase_uri(phase, "pruned") for phase in range(1, PHASES + 1)], done.uri("data")
    assert left(done) == Left(PHASES + 1, pruned[2], pruned[2], data)
    for phase in range(1, PHASES + 1):
        start = pruned[phase - 2] if phase > 1 else done.base_uri
        for step in ("calibrated", "scored", "pruned"):
            with without(done, done.phase_uri(phase, step)):
                assert left(done) == Left(phase, start, pruned[2], data), step
    with without(done, data):
        assert left(done).phase == 1


def test_an_evaluation_is_made_beside_the_phase_after_it_and_none_is_left_out(done):
    for phase in range(PHASES + 1):
        with without(done, done.measured_uri(phase)):
            assert left(done).phase == phase + 1
    with without(done, done.measured_uri(1), done.phase_uri(3, "pruned")):
        assert left(done).phase == 2


def test_a_step_that_mlflow_does_not_have_is_work(done):
    """It was killed after it had published."""
    client = connect(done.settings.tracking.uri)
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    (scored,) = client.search_runs(
        [experiment], "tags.`adapt_pruner.phase` = '2' and tags.`adapt_pruner.step` = 'score-layers'"
    )
    client.update_run(scored.info.run_id, status="RUNNING")
    assert left(done).phase == 2
    client.set_terminated(scored.info.run_id, "FINISHED")
    assert left(done).phase == PHASES + 1


def test_nothing_is_left_where_another_execution_is_at_work(done):
    assert run_needs_run(run=done.handle(), being_done_by="job x") == Left(0)
