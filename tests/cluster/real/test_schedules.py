"""A schedule that fires twice: the first run does the work, the second finds it done."""

import contextlib
import subprocess

import yaml

from core.errors import ClusterError
from core.storage.interface import join_uri
from pipelines.remote.client import pages
from pipelines.remote.following import ENDED
from tests.cluster.test_launcher import final_of
from tests.support.kubeflow import LONGEST_S, modified, wait_until
from tests.support.project import command_line


def test_the_second_run_of_a_schedule_does_nothing(kubeflow, tmp_path):
    recipe = kubeflow.recipe("schedule", {"training.tokens": "10240"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    experiment = f"{kubeflow.name} schedule"

    def schedule(*options):
        command, environment = command_line("schedule", *options, f"--experiment={experiment}")
        told = subprocess.run(
            command, env=kubeflow.environment(environment), cwd=tmp_path, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr
        return told.stdout

    name = schedule("recipe.yaml", "--cron=*/15 * * * * *").partition(":")[0]
    try:
        runs = wait_until(lambda: two_ended(kubeflow, experiment), LONGEST_S, "it did not fire twice")
    finally:
        schedule("--pause", name)
        schedule("--delete", name, "--now")
    first, second = runs
    assert [run.state for run in runs] == ["SUCCEEDED", "SUCCEEDED"]
    assert "publish" in done_in(kubeflow, first, recipe)
    assert done_in(kubeflow, second, recipe) == {"resolve-base", "needs-run", "finalize"}
    published = modified(join_uri(final_of(recipe), "MANIFEST.json"))
    assert first.created_at < published < first.finished_at
    assert name not in schedule_names(kubeflow)


def two_ended(kubeflow, experiment):
    """The first two runs of an experiment, once both have ended."""
    client, runs = kubeflow.client, []
    with contextlib.suppress(ClusterError), client.asked():  # a busy server may answer too late
        found = client.get_experiment(experiment_name=experiment, namespace=client.namespace)
        runs = list(pages(client.list_runs, "runs", experiment_id=found.experiment_id))
    runs = sorted(runs, key=lambda run: run.created_at)[:2]
    return runs if len(runs) == 2 and all(run.state in ENDED for run in runs) else None


def done_in(kubeflow, run, recipe):
    tasks = kubeflow.workflow(run.run_id, recipe).tasks
    return {task.name for task in tasks if task.phase == "Succeeded"}


def schedule_names(kubeflow):
    from pipelines.remote.schedules import list_schedules

    return [each.name for each in list_schedules(kubeflow.client)]
