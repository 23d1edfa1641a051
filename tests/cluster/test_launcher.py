"""The compiled pipeline on a cluster in small: real S3 for store and artifacts, real MLflow, dying pods."""

import contextlib

import pytest
from mlflow import MlflowClient

from core.settings.recipe import settings_from_dict
from core.storage.interface import join_uri
from core.storage.publication import open_publication, publish
from core.storage.store import open_store
from pipelines.adapt_accel import compile_pipeline
from tests.local.test_kills import content, orphans
from tests.support.ir import STEPS
from tests.support.launcher import FAILED, SKIPPED, SUCCEEDED, Cluster
from tests.support.project import recipe_with, run_all

PHASES = 3
TASKS = 5 + 1 + PHASES * 5
"""resolve-base, needs-run, prepare-data, publish, finalize; the dense model; five tasks a phase."""
GO_ON = "run/go on after the phases done before"


@pytest.fixture
def cluster_in(tmp_path, s3_server, s3_store_uri):
    """Make a cluster whose pods find the S3 server by the config map and the secret alone."""
    known = s3_server.environment()
    secret = {name: known[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    config = {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_DEFAULT_REGION": "eu-central-1"}
    config["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"

    def make(name, **options):
        root = join_uri(s3_store_uri, "artifacts", name)
        return Cluster(tmp_path / name, root, config=config, secret=secret, **options)

    return make


@pytest.fixture
def recipe(project, s3_store_uri):
    """Three phases; the base model is in the store, the texts are mounted in every pod."""
    base = join_uri(s3_store_uri, "base")
    publish(project / "base", base)
    texts = {"path": str(project / "texts.jsonl")}
    return recipe_with(
        {
            "model.base": base,
            "prune.phases": PHASES,
            "training.tokens": "2304",
            "training.save_every": "1 steps",
            "calibration.source": texts,
            "training.sources": [texts],
            "evaluation.perplexity": {"path": str(project / "held-out.txt")},
            "storage.store": join_uri(s3_store_uri, "store"),
        }
    )


def compile_to(path, recipe):
    compile_pipeline(settings_from_dict(recipe), path)
    return path


def paths_of(tasks, state):
    return [task.path for task in tasks if task.state == state]


def failures(tasks):
    return "\n".join(f"{task.path}: {task.log[-2000:]}" for task in tasks if task.state == FAILED)


def final_of(recipe):
    """Return where the only run of the store has published its result."""
    store = recipe["storage"]["store"]
    (key,) = {key.split("/")[1] for key in open_store(store).list("runs/")}
    return join_uri(store, "runs", key, "final")


@pytest.mark.slow
def test_a_run_whose_pods_die_ends_as_one_that_nobody_disturbs(recipe, cluster_in, tmp_path, s3_store_uri):
    victims = {
        "run/resolve-base": 0,
        "run/phase 1 of 3/calibrate": 3,
        "run/phase 2 of 3/recover-train": 6,
        "run/evaluate phase 1": 4,
        "run/publish": 5,
    }
    kill = lambda task, attempt: victims.get(task) if attempt == 1 else None  # noqa: E731
    path = compile_to(tmp_path / "pipeline.yaml", recipe)
    state, tasks = cluster_in("first", kill=kill, seed=1).run(path, {})
    assert state == SUCCEEDED, failures(tasks)
    assert paths_of(tasks, SUCCEEDED) == [task.path for task in tasks if task.path != GO_ON]
    assert len(tasks) == TASKS + 1
    assert {task.path for task in tasks if task.attempts > 1} <= victims.keys()
    assert sum(task.attempts for task in tasks) >= TASKS + 3, "some may have been done before their time"

    undisturbed = recipe | {"storage": {"store": join_uri(s3_store_uri, "undisturbed")}}
    with contextlib.chdir(tmp_path):
        _, expected = run_all(undisturbed, tmp_path / "undisturbed")
    assert content(final_of(recipe), tmp_path / "fetched") == content(expected, tmp_path / "expected")
    base = open_publication(recipe["model"]["base"])
    assert orphans(recipe["storage"]["store"]) == set()
    assert base is not None

    state, tasks = cluster_in("again", seed=2).run(path, {})
    assert state == SUCCEEDED
    assert paths_of(tasks, SUCCEEDED) == ["run/resolve-base", "run/needs-run", "finalize"]
    assert {"run/prepare", GO_ON} <= set(paths_of(tasks, SKIPPED))


@pytest.mark.slow
def test_a_task_that_fails_each_time_ends_the_run_and_the_next_run_starts_no_task_of_phases_that_are_done(
    recipe, cluster_in, tmp_path
):
    recipe["prune"]["phases"] = 2
    kill = lambda task, attempt: 0 if task.endswith("phase 2 of 2/prune-step") else None  # noqa: E731
    path = compile_to(tmp_path / "pipeline.yaml", recipe)
    state, tasks = cluster_in("first", kill=kill).run(path, {})
    assert state == FAILED
    (failed,) = [task for task in tasks if task.state == FAILED]
    assert (failed.path, failed.attempts) == ("run/phase 2 of 2/prune-step", 3)
    assert tasks[-1].path == "finalize"
    assert tasks[-1].state == SUCCEEDED
    assert "run/publish" in paths_of(tasks, SKIPPED)
    (run,) = mlflow_runs(tmp_path, "tags.`adapt_pruner.store` LIKE '%'")
    assert run.info.status == "FAILED"

    state, tasks = cluster_in("again").run(path, {})
    assert state == SUCCEEDED, failures(tasks)
    left = f"{GO_ON}/phases that are left"
    of_phase = [f"{left}/phase 1 of those left/{step}" for step in STEPS]
    beside = {f"{GO_ON}/evaluate the last phase that is done", f"{left}/evaluate phase 1 of those left"}
    expected = {"run/resolve-base", "run/needs-run", *of_phase, *beside, f"{GO_ON}/publish", "finalize"}
    assert set(paths_of(tasks, SUCCEEDED)) == expected
    done = {task.path for task in tasks if "already done" in task.log}
    assert {of_phase[0], of_phase[1]} <= done
    assert of_phase[2] not in done
    assert all("phase 2 " in task.log for task in tasks if task.path in of_phase), "not the first of all"
    (run,) = mlflow_runs(tmp_path, "tags.`adapt_pruner.store` LIKE '%'")
    assert run.info.status == "FINISHED"


def mlflow_runs(folder, query):
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, query)
