"""Runs that fail on Kubeflow Pipelines: the one line that says why, and those that are started again."""

import pytest

from tests.support.argo import driver, recorded, task
from tests.support.evidence import note
from tests.support.kfp_api import frame, frame_of
from tests.support.kfp_trial import (
    FIRST,
    NO_QUOTA_LEFT,
    failure_of,
    lines_of,
    submit,
    wait_for,
)

OWN = "cluster.components"
ENDS = {
    # where, what Argo says of the pod, what is told
    "an image that is not there": (
        "phase-3.calibrate",
        'ImagePullBackOff: Back-off pulling image "registry.example/x"',
        "phase 3 calibrate: its image cannot be pulled (ImagePullBackOff: Back-off pulling image "
        '"registry.example/x"). Correct cluster.image, push it, or give',
    ),
    "a quota": (
        "evaluate",
        NO_QUOTA_LEFT,
        f"evaluate dense model: a quota is used up ({NO_QUOTA_LEFT}). Wait for other runs to end, raise the "
        f"quota, or lower {OWN}.evaluate.gpus, {OWN}.evaluate.cpu and {OWN}.evaluate.memory.",
    ),
    "no GPU": (
        "evaluate-2",
        "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "evaluate phase 1: no node has room for it (Unschedulable: 0/3 nodes are available: 3 Insufficient "
        f"nvidia.com/gpu). Lower {OWN}.evaluate.gpus",
    ),
    "too little memory": (
        "publish",
        "main: OOMKilled (exit code 137)",
        f"publish: it ran out of memory (main: OOMKilled (exit code 137)). Raise {OWN}.publish.memory or",
    ),
    "an image whose user is root": (
        "publish",
        "CreateContainerConfigError: container has runAsNonRoot and image will run as root",
        "publish: its container cannot be created (CreateContainerConfigError: container has runAsNonRoot",
    ),
    "its timeout": (
        "phase-2.recover-train",
        "Pod was active on the node longer than the specified deadline",
        f"phase 2 recover-train: it took longer than {OWN}.recover-train.timeout (Pod was active",
    ),
    "its scratch volume": (
        "publish",
        'Usage of EmptyDir volume "scratch" exceeds the limit "1Mi". ',
        'publish: its temporary files are too large (Usage of EmptyDir volume "scratch" exceeds the limit '
        f'"1Mi"). Raise {OWN}.publish.scratch',
    ),
    "an eviction": (
        "publish",
        "The node was low on resource: memory.",
        "publish: it lost its pod (The node was low on resource: memory). Submit it again: it resumes",
    ),
    "a spot node that is taken away": (
        "phase.calibrate",
        "pod deleted",
        "phase 1 calibrate: it lost its pod (pod deleted). Submit",
    ),
    "a signal": (
        "phase.calibrate",
        "main: Error (exit code 143)",
        "phase 1 calibrate: it lost its pod (main: Error (exit code 143)). Submit",
    ),
    "its own reason": (
        "publish",
        "main: Error (exit code 1): error: s3://x: there is no bucket x, out of memory. Create it.\n",
        "publish failed: s3://x: there is no bucket x, out of memory. Create it. http",
    ),
    "something else": (
        "publish",
        "main: Error (exit code 1)",
        "publish failed: main: Error (exit code 1). Its log is in the UI. http",
    ),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_run_that_fails_says_why_in_one_line(api, recipe, what):
    place, message, expected = ENDS[what]
    phase_of_pod = "Error" if message == "pod deleted" else "Failed"
    tasks = [
        task("resolve-base", "Succeeded", ago=90, earlier="OOMKilled (exit code 137)"),  # then it went well
        task(place, phase_of_pod, message, ago=40, earlier="Error (exit code 9)"),
        task("prepare-data", "Failed", "main: Error (exit code 1)", ago=30),  # later
        task("finalize", "Failed", "main: Error (exit code 1): error: no lease", ago=50),
    ]
    result = wait_for(api, frame("RUNNING", *tasks[:2]), frame("FAILED", *tasks))
    assert failure_of(result).startswith(expected)
    note("Faults", f"a task on the cluster fails for {what}", "one line names the task, why and what to do")


def test_a_driver_that_fails_is_named(api, recipe):
    failed = driver("phase-2.prune-step", "Failed", "OOMKilled (exit code 137)")
    assert failure_of(wait_for(api, frame("FAILED", FIRST, failed))).startswith(
        "phase 2 prune-step's driver: it ran out of memory (OOMKilled (exit code 137)). Raise cluster.memory"
    )
    group = driver("prepare", "Error", "no such execution")
    assert failure_of(wait_for(api, frame("FAILED", FIRST, group))).startswith(
        "prepare's driver failed: no such execution. Its log is in the UI."
    )


def test_finalize_is_named_only_where_nothing_else_has_failed(api, recipe):
    failed = task("finalize", "Failed", "main: Error (exit code 1): error: it is damaged. Remove it.")
    said = failure_of(wait_for(api, frame("FAILED", FIRST, failed)))
    assert said.startswith("finalize failed: it is damaged. Remove it. http")


RECORDED = {
    "no such bucket, and finalize fails, too": "resolve-base failed: s3://x: there is no bucket x. Create",
    "out of memory": "phase 1 calibrate: it ran out of memory (main: OOMKilled (exit code 137)). Raise "
    "cluster.components.calibrate.memory or",
    "terminated": "the run was terminated, by a person or a program.",
    "longer than its timeout": "resolve-base: it took longer than cluster.components.resolve-base.timeout (",
    "a signal that ended a container": "phase 1 recover-train: it lost its pod (main: Error (exit "
    "code 143)). Submit it again",
    "too large a temporary file": "resolve-base: its temporary files are too large (Usage of EmptyDir volume",
}
RECORDED_WAITS = {
    "no such image: pulling": "resolve-base: its image cannot be pulled (ErrImagePull: failed to pull",
    "no such image: waiting": "resolve-base: its image cannot be pulled (ImagePullBackOff: Back-off pulling",
    "an image whose user is root": "resolve-base: its container cannot be created (Create",
    "no room": "resolve-base: no node has room for it (Unschedulable: 0/1 nodes are available: 1 "
    "Insufficient memory. no new claims",
}


@pytest.mark.parametrize("what", RECORDED)
def test_workflows_of_a_real_cluster_tell_why_they_failed(api, recipe, what):
    states, manifest = recorded()[what]
    assert failure_of(wait_for(api, *(frame_of(state, manifest) for state in states))).startswith(
        RECORDED[what]
    )
    note("Faults", f"on a real cluster: {what}", "one line names the task, why and what to do")


@pytest.mark.parametrize("what", RECORDED_WAITS)
def test_workflows_of_a_real_cluster_tell_why_they_wait(api, recipe, what):
    _, manifest = recorded()[what]
    result = wait_for(api, frame_of("RUNNING", manifest), frame_of("RUNNING", manifest), frame("SUCCEEDED"))
    assert [line for line in lines_of(result) if line.startswith(RECORDED_WAITS[what])]
    note("Faults", f"on a real cluster: {what}", "one line says so while the run waits")


def test_each_recorded_workflow_is_used():
    assert recorded().keys() == RECORDED.keys() | RECORDED_WAITS.keys() | {"a deleted pod, tried again"}


def test_a_deleted_pod_that_is_tried_again_is_no_failure(api, recipe):
    _, manifest = recorded()["a deleted pod, tried again"]
    result = wait_for(api, frame_of("RUNNING", manifest), frame("SUCCEEDED"))
    assert "resolve-base started" in lines_of(result)
    assert "taken away" not in result.stderr


def test_a_run_that_is_terminated_is_told_as_such(api, recipe):
    """It ends as failed; only what came before, or the workflow, says why."""
    killed = task("publish", "Failed", "main: Error (exit code 143)")
    for frames in (
        [frame("CANCELING", FIRST), frame("FAILED", FIRST, killed)],
        [frame("FAILED", FIRST, killed, deadline=0)],
        [frame("CANCELED", FIRST, killed)],
    ):
        api.frames = frames
        result = submit(api, "--wait", "--every", "0.01s", "--attempts", 2)
        assert failure_of(result).startswith(
            "the run was terminated, by a person or a program. Submit it again"
        )
        assert len(result.stdout.split()) == 1  # it is not started again
    note("Faults", "a person terminates a run", "one line says so; it is not started again", 3)


def test_the_workflow_s_own_reason_is_told_where_no_task_has_failed(api, recipe):
    said = failure_of(
        wait_for(api, frame("FAILED", FIRST, message="workflow is longer than maximum allowed size"))
    )
    assert said.startswith("the run failed: workflow is longer than maximum allowed size. Its log")


def test_what_never_ran_is_not_told_of_when_a_run_has_failed(api, recipe):
    failed = task("resolve-base", "Failed", "main: Error (exit code 1)")
    waits = task("needs-run", "Pending")
    shown = wait_for(api, frame("FAILED", failed, driver("publish", "Failed", "x"), waits)).stderr
    assert "resolve-base" in shown
    assert "needs-run" not in shown
    assert "waits" not in shown


TAKEN = ("pod deleted", "main: Error (exit code 143)", "The node was low on resource: memory.")
TAKEN += ("Pod was terminated in response to imminent node shutdown.",)


@pytest.mark.parametrize("message", TAKEN)
def test_a_run_whose_pods_were_taken_away_is_started_again(api, recipe, message):
    taken = frame(
        "FAILED", FIRST, task("phase-2.recover-train", "Error", message), task("finalize", "Succeeded")
    )
    ends = iter([[taken], [taken], [frame("SUCCEEDED", FIRST)]])

    def another(request):
        if request == "POST /runs":
            api.frames = next(ends)

    api.hook = another
    result = submit(api, "--wait", "--every", "0.01s", "--attempts", 3, "--run-name", "mine")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.split()) == 3
    assert result.stderr.count("phase 2 recover-train: it lost its pod") == 2
    assert "Attempt 3 of 3:" in result.stderr
    names = [run["display_name"] for run in api.runs.values()]
    assert names == ["mine", "mine (attempt 2)", "mine (attempt 3)"]
    first, *others = api.runs.values()
    same = ("pipeline_version_reference", "runtime_config", "experiment_id")
    assert all(run[key] == first[key] for run in others for key in same)
    ends = iter([[taken], [taken]])
    result = submit(api, "--wait", "--every", "0.01s", "--attempts", 2)
    assert failure_of(result).startswith("phase 2 recover-train: it lost its pod")
    assert next(ends, "none left") == "none left"
    note("Faults", f"a pod is taken away: {message}", "--attempts starts the run again, so many times")


def test_a_run_that_failed_by_itself_is_not_started_again(api, recipe):
    lost = task("phase-2.recover-train", "Error", "pod deleted", ago=20)
    for failed in (
        [task("publish", "Failed", "main: Error (exit code 1)")],
        [task("publish", "Failed", "main: OOMKilled (exit code 137)")],
        [lost, task("evaluate", "Failed", "main: Error (exit code 1): error: pod deleted", ago=10)],
    ):
        api.frames = [frame("FAILED", FIRST, *failed)]
        result = submit(api, "--wait", "--every", "0.01s", "--attempts", 9)
        assert failure_of(result)
        assert len(result.stdout.split()) == 1
    note("Faults", "a task fails by itself under --attempts", "the run is not started again", 3)


def test_attempts_share_one_timeout(api, recipe):
    api.frames = [frame("RUNNING", FIRST), frame("FAILED", task("publish", "Error", "pod deleted"))]
    result = submit(api, "--wait", "--every", "0.3s", "--timeout", "1s", "--attempts", 100)
    assert "--timeout is over; the run continues: http" in failure_of(result)
    assert 1 < len(api.runs) < 6
