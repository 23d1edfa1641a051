"""Names of what does not exist: the run ends, or waits, with one line that says which."""

import uuid

import pytest

from core.errors import ClusterError
from core.settings.recipe import settings_from_dict
from pipelines.remote.following import follow
from pipelines.remote.submission import prepare, start
from tests.support.kubeflow import LONGEST_S


def error_of(followed):
    code, text = followed.end()
    assert code == 1, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def test_an_image_that_does_not_exist(kubeflow):
    recipe = kubeflow.recipe("image")
    recipe["cluster"]["image"] += "-that-does-not-exist"
    submission = prepare(settings_from_dict(recipe))
    run_id, _ = start(kubeflow.client, submission, run_name=kubeflow.name, experiment=kubeflow.name)
    tasks = submission.package.tasks
    with pytest.raises(ClusterError, match=r"^resolve-base: its image cannot be pulled \(.*Correct cluster"):
        follow(kubeflow.client, run_id, tasks, lambda progress: None, poll_s=2, image_s=10)
    assert kubeflow.state(run_id) in ("RUNNING", "PENDING")
    kubeflow.remove_run(run_id)


def test_a_bucket_that_does_not_exist(kubeflow, tmp_path):
    bucket = f"cluster-test-{uuid.uuid4().hex}"
    recipe = kubeflow.recipe("bucket", {"storage.store": f"s3://{bucket}/store"})
    said = error_of(kubeflow.submit(recipe, tmp_path))
    assert said.startswith(f"error: resolve-base failed: s3://{bucket}/store/runs/")
    assert f"cannot be read: there is no bucket {bucket} " in said
    assert "Create it, or correct the URI." in said


def test_a_secret_that_does_not_exist(pods, tmp_path):
    if pods.credentials["secret"] != pods.name:
        pytest.skip("pods may have a cloud role: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    recipe = pods.recipe("secret")
    recipe["cluster"]["secret"] = f"{pods.name}-that-does-not-exist"
    said = error_of(pods.submit(recipe, tmp_path, f"--timeout={LONGEST_S}s"))
    assert said.startswith("error: resolve-base failed: ")
    assert "credentials" in said
