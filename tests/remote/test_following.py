"""Following a run on Kubeflow Pipelines to its end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import ClusterError
from core.settings.recipe import load_recipe
from pipelines.remote.client import connect
from pipelines.remote.following import follow
from pipelines.remote.submission import prepare, start
from tests.support.argo import driver, of_older_argo, task
from tests.support.evidence import note
from tests.support.kfp_api import Cut, Refused, frame, run_kfp_api
from tests.support.kfp_trial import (
    FIRST,
    STEPS,
    failure_of,
    lines_of,
    phase,
    submit,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[2]


RETRIES = "retries: deleted pods are retried; failed tasks are not, whatever cluster.retries says"


def test_waiting_shows_each_task_and_ends_with_the_run(api, recipe):
    running = frame("RUNNING", task("resolve-base", "Running"))
    done = [FIRST, *phase(1), *phase(2)]
    result = wait_for(
        api,
        frame("PENDING"),
        frame("RUNNING", driver("resolve-base", "Running")),
        frame("RUNNING", task("resolve-base", "Pending")),
        running,
        running,
        frame("RUNNING", FIRST, *phase(1), *phase(2, "Running", STEPS[:1])),
        frame("SUCCEEDED", *done, task("evaluate-2", "Skipped"), task("finalize", "Succeeded")),
    )
    assert result.exit_code == 0, result.output
    assert lines_of(result) == [
        f"{RETRIES} (Argo's retryPolicy is OnError here)",
        "resolve-base started",
        "resolve-base succeeded after",
        *(f"phase 1 {step} succeeded after" for step in STEPS),
        "phase 2 calibrate started",
        *(f"phase 2 {step} succeeded after" for step in STEPS),
        "evaluate phase 1 skipped",
        "finalize succeeded after",
        "succeeded",
    ]
    assert len(result.stdout.splitlines()) == 1


def test_a_workflow_over_1_mib_is_followed_as_well(api, recipe):
    """From there on the tasks of the newer API do not change any more."""
    before = [FIRST, *(state for number in range(1, 4) for state in phase(number))]
    more = [state for number in range(4, 9) for state in phase(number)]
    result = wait_for(
        api,
        frame("RUNNING", *before),
        frame("RUNNING", *before, *more, *phase(9, "Running", STEPS[:2])),
        frame("SUCCEEDED", *before, *more, *phase(9)),
    )
    (run,) = api.runs.values()
    assert "compressedNodes" in run["manifest"]["status"]
    assert not any(each["display_name"] == "phase-9" for each in run["run_details"]["task_details"])
    shown = lines_of(result)
    assert "phase 9 score-layers started" in shown
    assert "phase 9 recover-train succeeded after" in shown
    note("Faults", "a workflow outgrows 1 MiB, and the API's tasks stand still", "Argo's are shown")


def test_the_clock_is_that_of_argo(api, recipe):
    result = wait_for(api, frame("SUCCEEDED", task("publish", "Succeeded", ago=3_000)))
    (line,) = [line for line in result.stderr.splitlines() if "publish" in line]
    ended = time.time() - 2_999
    assert line[:8] in [time.strftime("%H:%M:%S", time.localtime(ended - early)) for early in range(5)]


def test_up_to_kfp_2_16_nodes_have_other_names(api, recipe):
    nodes = [*phase(1), task("phase-2.calibrate", "Failed", "OOMKilled (exit code 137)")]
    old = [of_older_argo(each) for each in nodes]
    assert not any("root(0)" in node["name"] for each in old for node in each)
    result = wait_for(api, frame("FAILED", *old, policy=""))
    assert failure_of(result).startswith("phase 2 calibrate: it ran out of memory")
    assert lines_of(result)[0] == (
        "retries: failed tasks are retried, cluster.retries times; a deleted pod ends the run (Argo's "
        "retryPolicy is OnFailure here)"
    )
    assert "phase 1 recover-train succeeded after" in lines_of(result)


def test_a_template_may_have_a_policy_of_its_own(api, recipe):
    said = frame("SUCCEEDED", FIRST)
    said["manifest"]["spec"]["templates"][0]["retryStrategy"]["retryPolicy"] = "Always"
    assert lines_of(wait_for(api, said))[0].startswith("retries: failed tasks and deleted pods are retried")


def test_a_server_without_the_older_api_shows_the_state_of_the_run(api, recipe):
    api.old = False
    oom = task("publish", "Failed", "OOMKilled")
    result = wait_for(
        api, frame("PENDING"), frame("RUNNING", oom), frame("RUNNING", oom), frame("FAILED", oom)
    )
    assert failure_of(result).startswith("the run failed. Its log is in the UI.")
    assert lines_of(result)[:-1] == [
        "this server lacks the older API of Kubeflow Pipelines (v1beta1): only the state of the run is "
        "shown. Its tasks are in the UI.",
        "the run pending",
        "the run running",
        "the run failed",
    ]
    note("Faults", "a server has no older API", "one line says so, and the run's state is shown")


@pytest.mark.parametrize(
    "workflow",
    ["{", "[]", "null", '{"status": []}', '{"status": {"nodes": [1]}}', '{"status": {"nodes": {"a": 1}}}']
    + ['{"status": {"nodes": {"a": {}}}}', '{"spec": {"templates": 1, "templateDefaults": []}}']
    + [json.dumps({"status": {"compressedNodes": packed}}) for packed in ("x", "AAAA", "H4sIAA==")],
)
def test_a_workflow_that_makes_no_sense_tells_nothing(api, recipe, monkeypatch, workflow):
    answer = {"pipeline_runtime": {"workflow_manifest": workflow}}
    monkeypatch.setattr(type(api), "workflow", lambda *arguments: answer)
    said = failure_of(wait_for(api, frame("FAILED", error="OOMKilled (exit code 137)")))
    assert said.startswith("the run failed: OOMKilled (exit code 137). Its log is in the UI.")


def test_an_image_that_cannot_be_pulled_is_told_once_and_ends_the_waiting(api, recipe):
    """Such a run waits for ever on the cluster, and the words for it take turns."""

    def pulls(message):
        return frame("RUNNING", FIRST, task("phase.calibrate", "Pending", message))

    turns = [pulls("ErrImagePull: manifest unknown"), pulls("ImagePullBackOff: Back-off pulling image")]
    api.frames = turns * 20
    submission = prepare(load_recipe(Path(recipe)))
    client, seen = connect(host=api.endpoint), []
    run, _ = start(client, submission, run_name="x", experiment="e")
    with pytest.raises(
        ClusterError, match=r"^phase 1 calibrate: its image cannot be pulled .*The run waits: http"
    ):
        follow(client, run, submission.package.tasks, seen.append, poll_s=0.01, image_s=0.05)
    assert seen
    # A registry that has come back meanwhile starts the time from zero.
    api.frames = [*turns, frame("RUNNING", task("phase.calibrate", "Running")), *turns, frame("SUCCEEDED")]
    run, _ = start(client, submission, run_name="x", experiment="e")
    ended = follow(
        client,
        run,
        submission.package.tasks,
        lambda progress: None if progress.trouble else time.sleep(1.1),
        poll_s=0.01,
        image_s=1.0,
    )
    assert ended.state == "SUCCEEDED"
    result = submit(api, "--wait", "--every", "0.01s")
    assert result.stderr.count("its image cannot be pulled") == 1
    assert "its image cannot be pulled (ErrImagePull: manifest unknown)" in result.stderr
    note(
        "Faults", "an image cannot be pulled, and the run waits", "one line says so; waiting ends if it lasts"
    )


def test_a_pod_that_waits_is_told_why(api, recipe):
    def shown(message, **more):
        waits = task("phase.calibrate", "Pending", message, **more)
        return wait_for(api, *[frame("RUNNING", FIRST, waits)] * 2, frame("SUCCEEDED")).stderr

    gated = "SchedulingGated: Scheduling is blocked due to non-empty scheduling gates"
    oom = "OOMKilled (exit code 137)"
    said = shown(gated, ago=40, earlier=oom)
    assert said.count(f"phase 1 calibrate: Kueue has not admitted it ({gated}). Wait, or check that") == 1
    assert "the queue named by cluster.components.calibrate.queue exists" in said
    assert "OOMKilled" not in said, "what an earlier attempt failed for is over"
    said = shown("ContainerCreating", ago=40, earlier=oom)
    assert "waited" not in said
    assert "OOMKilled" not in said
    assert "Kueue" not in shown(gated, ago=2)  # it may be about to start
    note("Faults", "a pod waits for Kueue", "one line says so")


def test_a_pod_that_does_not_start_is_told_even_if_argo_does_not_say_why(api, recipe):
    for waits, told in (
        (task("publish", "Pending", ago=3000), "publish has waited for over five minutes. See `kubectl"),
        (
            task("publish", "Pending", "ContainerCreating", ago=3000),
            "publish has waited for over five minutes (ContainerCreating). See `kubectl describe pod`.",
        ),
        (driver("publish", "Pending", ago=3000), "publish's driver has waited for over five minutes"),
        (task("publish", "Pending", ago=200), ""),
        (task("publish", "Running", ago=3000), ""),
    ):
        result = wait_for(api, *[frame("RUNNING", waits)] * 3, frame("SUCCEEDED"))
        assert result.exit_code == 0
        assert result.stderr.count("waited") == bool(told)
        assert told in result.stderr
    note("Faults", "a pod does not start, and Argo does not say why", "one line says where to look", 3)


def test_what_passes_is_waited_for(api, recipe):
    troubles = iter([Refused(503, "restarting"), Cut(), Refused(429, "slow"), Refused(500, "x"), Cut()])

    def trouble(request):
        if request.startswith("GET /runs/") and (problem := next(troubles, None)):
            raise problem

    api.hook = trouble
    result = submit(api, "--wait", "--every", "0.001s")
    assert result.exit_code == 0, result.stderr
    assert next(troubles, "none left") == "none left"
    note("Faults", "the API fails five times while a run is followed", "it is asked again", 5)


def test_a_server_that_stays_away_ends_the_waiting_not_the_run(api, recipe):
    def trouble(request):
        if request.startswith("GET /runs/"):
            raise Refused(503, "down")

    api.hook = trouble
    result = submit(api, "--wait", "--every", "0.001s")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {api.endpoint} answers 503 (down).")
    assert last.endswith(f"The run continues: {result.stdout.strip()}")
    assert api.asked("GET /runs/") == 8


def test_a_token_that_expires_while_waiting_ends_the_waiting_not_the_run(recipe, tmp_path):
    def expire(request):
        if request.startswith("GET /runs/"):
            api.tokens = ("second",)

    (tmp_path / "token").write_text("first")
    with run_kfp_api(tokens=("first",), hook=expire) as api:
        result = submit(api, "--wait", "--every", "0.01s", "--token-file", "token")
        assert result.exit_code == 1
        last = result.stderr.splitlines()[-1]
        assert "refuses the login: it is missing or has expired" in last
        assert last.endswith(f"The run continues: {result.stdout.strip()}")
        assert api.asked("GET /runs/") == 1
    note("Faults", "a token expires while a run is followed", "one line says so; the run goes on")


def test_a_token_that_is_renewed_while_waiting_is_read_again(recipe, tmp_path):
    def renew(request):
        if request.startswith("GET /runs/"):
            api.tokens = ("first", "second") if api.tokens == ("first",) else ("second",)
            (tmp_path / "token").write_text("second")

    (tmp_path / "token").write_text("first")
    with run_kfp_api(tokens=("first",), hook=renew) as api:
        assert submit(api, "--wait", "--every", "0.01s", "--token-file", "token").exit_code == 0
        assert api.tokens == ("second",)
    note("Faults", "the file of a token is renewed while a run is followed", "it is read again")


def test_time_is_up(api, recipe):
    api.frames = [frame("RUNNING")]
    for every in ("0.01s", "10h"):  # it is not slept through
        result = submit(api, "--wait", "--every", every, "--timeout", "0.1s")
        assert result.exit_code == 1
        assert "--timeout is over; the run continues: http" in result.stderr


def test_who_stops_waiting_does_not_stop_the_run(api, recipe, tmp_path):
    api.frames = [frame("RUNNING", task("resolve-base", "Running"))]
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "submit", recipe, "--wait"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KF_PIPELINES_ENDPOINT": api.endpoint}
    process = subprocess.Popen(
        [*command, "--every", "0.1s"],
        env=environment,
        stdout=-1,
        stderr=-1,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run under nohup
    )
    try:
        while api.asked("GET /runs/") < 2:
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"error: interrupted; the run continues: {out.strip()}"
    assert "Traceback" not in errors
    assert not any("terminate" in request or request.startswith("DELETE") for request in api.requests)
