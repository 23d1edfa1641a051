"""Following a run on Kubeflow Pipelines to its end."""

import datetime
import io
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
from tests.kfp_api import Cut, Refused, frame, run_kfp_api, task
from tests.kfp_trial import NO_QUOTA_LEFT, forget_kfp, submit, write_trial

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    forget_kfp(monkeypatch)


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
        task("calibrate", "FAILED", 'ImagePullBackOff: Back-off pulling image "registry.example/x"'),
        "phase 1 calibrate: its image cannot be pulled (ImagePullBackOff: Back-off pulling image "
        '"registry.example/x"). Correct cluster.image, push it, or give',
    ),
    "a quota": (
        task("evaluate", "FAILED", NO_QUOTA_LEFT),
        "evaluate dense model: a quota is used up (pods",
    ),
    "no GPU": (
        task("evaluate", "FAILED", "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        "evaluate dense model: no node has room for it (Unschedulable: 0/3 nodes are available: 3",
    ),
    "too little memory": (
        task("publish", "FAILED", "OOMKilled (exit code 137)"),
        "publish: it ran out of memory (OOMKilled (exit code 137)). Raise cluster.memory",
    ),
    "a secret that is missing": (
        task("publish", "FAILED", 'CreateContainerConfigError: secret "adapt-pruner" not found'),
        "publish: a secret or a config map is missing",
    ),
    "an eviction": (
        task("publish", "FAILED", "The node was low on resource: memory."),
        "publish: its node took it away",
    ),
    "something else": (
        task("publish", "FAILED", "Error (exit code 1)"),
        "publish failed: Error (exit code 1). Its log is in the UI.",
    ),
    "nothing that the API tells of": (task("publish", "FAILED"), "publish failed. Its log is in the UI."),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_run_that_fails_says_why_in_one_line(api, recipe, what):
    failed, expected = ENDS[what]
    api.frames = [frame("RUNNING"), frame("FAILED", task("resolve-base", "SUCCEEDED"), failed)]
    result = submit(api, "--wait", "--every", "0.01s")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {expected}")
    assert errors[0].endswith(f" {result.stdout.strip()}")
    note("Faults", f"a task on the cluster fails for {what}", "one line names the task, why and what to do")


def test_what_is_said_of_a_pod_or_of_the_run_counts_too(api, recipe):
    oom = "OOMKilled (exit code 137)"
    for said in (
        frame("FAILED", task("publish", "FAILED"), task("executor", "FAILED", oom)),
        frame("FAILED", task("publish-driver", "FAILED", oom), task("publish", "FAILED")),
        frame("FAILED", task("publish", "FAILED"), error=oom),
        frame("FAILED", error=oom),
        frame(
            "FAILED",
            task("publish", "FAILED", state_history=[{"state": "FAILED", "error": {"message": oom}}]),
        ),
    ):
        api.frames = [said]
        result = submit(api, "--wait", "--every", "0.01s")
        assert "it ran out of memory (OOMKilled (exit code 137))" in result.stderr
        assert result.exit_code == 1
    api.frames = [frame("CANCELED", task("publish", "CANCELED"))]
    assert "the run was cancelled." in submit(api, "--wait").stderr


def test_an_image_that_cannot_be_pulled_is_told_while_the_run_waits(api, recipe):
    """Such a run waits for ever on the cluster."""
    waiting = task("calibrate", "RUNNING", "ErrImagePull: manifest unknown")
    api.frames = [frame("RUNNING", waiting)]
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
    api.frames = [frame("RUNNING", waiting), frame("RUNNING", task("calibrate", "RUNNING"))]
    api.frames += [frame("RUNNING", waiting), frame("SUCCEEDED")]
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


def test_a_pod_that_does_not_start_is_told_even_if_the_api_does_not_say_why(api, recipe):
    now, zero = datetime.datetime.now(datetime.UTC), "0001-01-01T00:00:00Z"
    early, late = ((now - datetime.timedelta(seconds=s)).isoformat() for s in (30, 3000))
    for name, created, told in (
        ("executor", late, "a task: it has waited for over five minutes"),
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
    result = submit(api, "--wait", "--every", "0.01s", "--timeout", "0.05s")
    assert result.exit_code == 1
    assert "--timeout: the run has not ended in 0 s, and goes on." in result.stderr


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
