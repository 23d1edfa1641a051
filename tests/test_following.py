"""Following a run on Kubeflow Pipelines to its end."""

import datetime
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from core.errors import ClusterError
from core.recipe import load_recipe
from pipelines.following import Patience, Progress, TaskState, follow
from pipelines.kfp_access import Access, connect
from pipelines.run_view import RunView
from pipelines.submit import prepare, start
from tests.evidence import note
from tests.kfp_api import Cut, Refused, failure, frame, pod, run_kfp_api, task
from tests.kfp_trial import NO_QUOTA_LEFT, forget_kfp, submit, write_trial

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    forget_kfp(monkeypatch)
    monkeypatch.setattr("pipelines.following._SHORTEST_PAUSE_S", 0.001)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    return write_trial(tmp_path, monkeypatch)


@pytest.fixture
def api():
    with run_kfp_api() as running:
        yield running


PHASES = [task(name, "SUCCEEDED") for name in ("calibrate", "score-layers", "prune-step", "recover-train")]


def test_waiting_shows_each_task_and_ends_with_the_run(api, recipe):
    first = [task("resolve-base-driver", "SUCCEEDED"), task("resolve-base", "RUNNING")]
    api.frames = [
        frame("PENDING"),
        frame("RUNNING", *first),
        frame("RUNNING", *first),
        frame("RUNNING", task("resolve-base", "SUCCEEDED"), *PHASES, task("calibrate", "RUNNING")),
        frame(
            "SUCCEEDED", task("resolve-base", "SUCCEEDED"), *PHASES, *PHASES, task("evaluate-2", "SKIPPED")
        ),
    ]
    result = submit(api, "--wait", "--every", "0.01s")
    assert result.exit_code == 0, result.output
    lines = [re.sub(r" +", " ", line) for line in result.stderr.splitlines()[1:]]
    lines = [re.sub(r"after .*", "after", line) for line in lines]
    steps = ("calibrate", "score-layers", "prune-step", "recover-train")
    assert lines == [
        "resolve-base started",
        "resolve-base succeeded after",
        *(f"phase 1 {step} succeeded after" for step in steps),
        "phase 2 calibrate started",
        *(f"phase 2 {step} succeeded after" for step in steps),
        "evaluate phase 1 skipped",
        "succeeded",
    ]
    assert len(result.stdout.splitlines()) == 1


ENDS = {
    "an image that is not there": (
        ("phase-3.calibrate.executor(0)", 'ImagePullBackOff: Back-off pulling image "registry.example/x"'),
        "phase 3 calibrate: its image cannot be pulled (ImagePullBackOff: Back-off pulling image "
        '"registry.example/x"). Correct cluster.image, push it, or give',
    ),
    "a quota": (("evaluate.executor", NO_QUOTA_LEFT), "evaluate dense model: a quota is used up (pods"),
    "no GPU": (
        ("evaluate-2.executor(1)", "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        "evaluate phase 1: no node has room for it (Unschedulable: 0/3 nodes are available: 3",
    ),
    "too little memory": (
        ("publish.executor(2)", "OOMKilled (exit code 137)"),
        "publish: it ran out of memory (OOMKilled (exit code 137)). Raise cluster.memory",
    ),
    "an image whose user is root": (
        (
            "publish.executor",
            "CreateContainerConfigError: container has runAsNonRoot and image will run as root",
        ),
        "publish: its container cannot be made (CreateContainerConfigError: container has runAsNonRoot",
    ),
    "an eviction": (
        ("publish.executor", "The node was low on resource: memory."),
        "publish: its node took it away",
    ),
    "a spot node that is taken away": (("phase.calibrate.executor", "pod deleted"), "phase 1 calibrate: its"),
    "something else": (
        ("publish.executor", "Error (exit code 1)"),
        "publish failed: Error (exit code 1). Its log is in the UI.",
    ),
    "a driver that fails": (
        ("phase-2.prune-step-driver", "Error (exit code 2)"),
        "phase 2 prune-step failed: Error (exit code 2).",
    ),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_run_that_fails_says_why_in_one_line(api, recipe, what):
    (place, message), expected = ENDS[what]
    api.packs = what in ("a quota", "no GPU")
    pods = [
        pod(
            "resolve-base.executor(0)", "Failed", "OOMKilled (exit code 137)", started=1
        ),  # then it went well
        pod("resolve-base.executor(1)", "Succeeded", started=2),
        pod("calibrate.executor", "Failed", "", started=3),
        pod(place, "Error" if message == "pod deleted" else "Failed", message, started=4),
    ]
    tasks = [task("resolve-base", "SUCCEEDED"), task("publish", "FAILED")]
    api.frames = [frame("RUNNING", pods=pods), frame("FAILED", *tasks, pods=pods)]
    result = submit(api, "--wait", "--every", "0.01s")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {expected}")
    assert errors[0].endswith(f" {result.stdout.strip()}")
    assert api.asked("GET /apis/v1beta1/runs/") == 1
    note("Faults", f"a task on the cluster fails for {what}", "one line names the task, why and what to do")


def test_the_last_attempt_counts(api, recipe):
    pods = [
        pod("publish.executor(0)", "Failed", "Error (exit code 1)", started=1),
        pod("publish.executor(2)", "Failed", "Error (exit code 3)", started=3),
        pod("publish.executor(1)", "Failed", "Error (exit code 2)", started=2),
    ]
    api.frames = [frame("FAILED", task("publish", "FAILED"), pods=pods)]
    assert "publish failed: Error (exit code 3)." in submit(api, "--wait").stderr


def test_a_server_that_tells_nothing_of_pods_is_believed(api, recipe):
    api.old = False
    for tasks, expected in (
        ([task("publish", "FAILED")], "error: publish failed. Its log is in the UI."),
        ([task("calibrate-driver", "FAILED")], "error: calibrate failed. Its log is in the UI."),
        ([], "error: the run failed. Its log is in the UI."),
    ):
        api.frames = [frame("FAILED", *tasks, pods=[pod("publish.executor", "Failed", "OOMKilled")])]
        assert expected in submit(api, "--wait", "--every", "0.01s").stderr
    note("Faults", "a run fails, and the API tells of no pod", "one line names the task", 3)


@pytest.mark.parametrize(
    "workflow",
    ["{", "[]", "null", '{"status": []}', '{"status": {"nodes": [1]}}', '{"status": {"nodes": {"a": 1}}}']
    + [json.dumps({"status": {"compressedNodes": packed}}) for packed in ("x", "AAAA", "H4sIAA==")],
)
def test_a_workflow_that_makes_no_sense_tells_nothing(api, recipe, monkeypatch, workflow):
    answer = {"pipeline_runtime": {"workflow_manifest": workflow}}
    monkeypatch.setattr(type(api), "workflow", lambda *arguments: answer)
    api.frames = [frame("FAILED", task("publish", "FAILED"))]
    assert "error: publish failed" in submit(api, "--wait", "--every", "0.01s").stderr


def test_what_the_api_says_of_a_task_or_of_the_run_counts_too(api, recipe):
    oom = failure("OOMKilled (exit code 137)")
    for said in (
        frame("FAILED", task("publish", "FAILED"), task("executor", "FAILED", error=oom)),
        frame("FAILED", task("publish-driver", "FAILED", error=oom), task("publish", "FAILED")),
        frame("FAILED", task("publish", "FAILED"), error="OOMKilled (exit code 137)"),
        frame("FAILED", error="OOMKilled (exit code 137)"),
        frame("FAILED", task("publish", "FAILED", state_history=[{"state": "FAILED", "error": oom}])),
    ):
        api.frames = [said]
        result = submit(api, "--wait", "--every", "0.01s")
        assert "it ran out of memory (OOMKilled (exit code 137))" in result.stderr
        assert result.exit_code == 1
    api.frames = [frame("CANCELED", task("publish", "CANCELED"))]
    assert "the run was cancelled." in submit(api, "--wait").stderr


def test_what_never_ran_is_not_told_of_when_a_run_has_failed(api, recipe):
    api.frames = [
        frame(
            "FAILED",
            task("resolve-base", "FAILED"),
            task("needs-run", "RUNTIME_STATE_UNSPECIFIED"),
            task("publish", "PENDING"),
        )
    ]
    shown = submit(api, "--wait", "--every", "0.01s").stderr
    assert "resolve-base" in shown
    assert "needs-run" not in shown
    assert "waits" not in shown


def test_an_image_that_cannot_be_pulled_is_told_while_the_run_waits(api, recipe):
    """Such a run waits for ever on the cluster."""
    long_ago = "2026-01-01T00:00:00Z"
    tasks = [task("calibrate", "RUNNING"), task("executor(0)", "PENDING", create_time=long_ago)]
    pulls = pod("phase.calibrate.executor(0)", "Pending", "ErrImagePull: manifest unknown")
    waiting = frame("RUNNING", *tasks, pods=[pulls])
    api.frames = [waiting]
    submission = prepare(load_recipe(Path(recipe)))
    client, seen = connect(Access(host=api.endpoint)), []
    run = start(client, submission, run_name="x", experiment="e")
    patience = Patience(poll_s=0.01, image_s=0.05, timeout_s=20)
    with pytest.raises(
        ClusterError, match=r"^phase 1 calibrate: its image cannot be pulled .*The run waits: http"
    ):
        follow(client, run.id, submission.package.tasks, seen.append, patience)
    assert seen
    # A registry that has come back meanwhile starts the time anew.
    api.frames = [waiting, frame("RUNNING", task("calibrate", "RUNNING")), waiting, frame("SUCCEEDED")]
    run = start(client, submission, run_name="x", experiment="e")
    patience = Patience(poll_s=0.01, image_s=1.0)
    ended = follow(
        client,
        run.id,
        submission.package.tasks,
        lambda progress: None if progress.trouble else time.sleep(1.1),
        patience,
    )
    assert ended.state == "SUCCEEDED"
    result = submit(api, "--wait", "--every", "0.01s")
    assert result.stderr.count("its image cannot be pulled (ErrImagePull: manifest unknown)") == 2
    note(
        "Faults", "an image cannot be pulled, and the run waits", "one line says so; waiting ends if it lasts"
    )


def test_a_task_that_found_no_room_and_runs_now_is_no_trouble(api, recipe):
    history = [
        {"state": "PENDING", "error": {"code": 1, "message": "Unschedulable: 0/3 nodes are available"}},
    ]
    running = task("calibrate", "RUNNING", state_history=[*history, {"state": "RUNNING"}])
    api.frames = [
        frame("RUNNING", task("calibrate", "PENDING", state_history=history)),
        frame("RUNNING", running),
        frame("SUCCEEDED", task("calibrate", "SUCCEEDED")),
    ]
    submission, client, seen = prepare(load_recipe(Path(recipe))), connect(Access(host=api.endpoint)), []
    run = start(client, submission, run_name="x", experiment="e")
    follow(client, run.id, submission.package.tasks, seen.append, Patience(poll_s=0.01))
    assert ["no node has room for it" in progress.trouble for progress in seen] == [True, False, False]


def test_a_pod_that_waits_is_told_why(api, recipe):
    def shown(*pods, seconds=40):
        created = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
        waits = task("executor(0)", "PENDING", create_time=created.isoformat())
        api.frames = [frame("RUNNING", task("calibrate", "RUNNING"), waits, pods=pods)] * 2
        api.frames += [frame("SUCCEEDED")]
        return submit(api, "--wait", "--every", "0.01s").stderr

    gated = "SchedulingGated: Scheduling is blocked due to non-empty scheduling gates"
    earlier = pod("phase.calibrate.executor(0)", "Failed", "OOMKilled (exit code 137)", started=1)
    said = shown(earlier, pod("phase.calibrate.executor(1)", "Pending", gated, started=2))
    assert said.count(f"phase 1 calibrate: Kueue has not admitted it ({gated}).") == 1
    assert "OOMKilled" not in said
    said = shown(earlier, pod("phase.calibrate.executor(1)", "Pending", "ContainerCreating", started=2))
    assert "waited" not in said
    assert "OOMKilled" not in said, "what an earlier attempt failed for is over"
    api.requests.clear()
    assert "Kueue" not in shown(pod("phase.calibrate.executor(1)", "Pending", gated), seconds=2)
    assert api.asked("GET /apis/v1beta1") == 0  # it may be about to start
    note("Faults", "a pod waits for Kueue", "one line says so")


def test_a_pod_that_does_not_start_is_told_even_if_the_api_does_not_say_why(api, recipe):
    now, zero = datetime.datetime.now(datetime.UTC), "0001-01-01T00:00:00Z"
    early, late = ((now - datetime.timedelta(seconds=s)).isoformat() for s in (30, 3000))
    for name, created, told in (
        ("executor", late, "publish: it has waited for over five minutes"),
        ("publish-driver", late, "publish: it has waited for over five minutes"),
        ("executor", early, ""),
        ("executor", zero, ""),
    ):
        pending = task(name, "PENDING", create_time=created, start_time=zero, end_time=zero)
        running = task("publish", "RUNNING", create_time=late)
        api.frames = [*[frame("RUNNING", running, pending)] * 3, frame("SUCCEEDED")]
        result = submit(api, "--wait", "--every", "0.01s")
        assert result.exit_code == 0
        assert result.stderr.count("it has waited") == bool(told)
        assert told in result.stderr
    note("Faults", "a pod does not start, and the API does not say why", "one line says where to look", 2)


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
    assert last.endswith(f"The run goes on: {result.stdout.strip()}")
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
        assert last.endswith(f"The run goes on: {result.stdout.strip()}")
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
        assert "--timeout: the run has not ended in 0.1 s, and goes on." in result.stderr


def test_who_stops_waiting_does_not_stop_the_run(api, recipe, tmp_path):
    api.frames = [frame("RUNNING", task("resolve-base", "RUNNING"))]
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
    assert errors.splitlines()[-1] == f"error: interrupted; the run goes on: {out.strip()}"
    assert "Traceback" not in errors
    assert not any("terminate" in request or request.startswith("DELETE") for request in api.requests)


def test_a_terminal_shows_what_runs():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    running = TaskState(name="publish", state="RUNNING", seconds=75.0, reason="")
    done = TaskState(name="finalize", state="SUCCEEDED", seconds=3.0)
    with RunView(console, {"publish": "publish", "finalize": "finalize"}) as view:
        view.show(Progress(state="RUNNING", tasks=(running,)))
        view.show(Progress(state="RUNNING", tasks=(running, done)))
        shown = console.file.getvalue()
    assert "1 min 15 s" in shown or "75 s" in shown
    assert "1 tasks done" in shown
    assert shown.count("succeeded after") == 1
