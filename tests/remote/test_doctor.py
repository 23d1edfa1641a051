"""The doctor: each thing that a run needs, broken alone, has its line, which says what to do."""

import json
import re

import pytest
from click.testing import CliRunner

from core.steps.check_pod import CHECKS, MARK
from pipelines.cli import main
from tests.support.argo import driver, task
from tests.support.doctor import PODS, PULL, doctor, ended, findings, fixes, table
from tests.support.ir import executors, parse, problems
from tests.support.kfp_api import Refused, frame

pytestmark = pytest.mark.usefixtures("quick")


def test_everything_is_fine(api, recipe, kubernetes):
    api.logs = {pod: findings() for pod in PODS}
    api.frames = [frame("PENDING"), frame("RUNNING", *(driver(f"root.{p}", "Running") for p in PODS))]
    api.frames += [
        frame("RUNNING", task("root.calibrate", "Running"), task("root.finalize", "Pending", ago=1)),
        ended(*PODS, policy="Always"),
    ]
    result = doctor(api, "--kubeconfig", kubernetes[1])
    assert result.exit_code == 0, result.output
    lines = table(result)
    assert {state for found in lines.values() for state, _ in found} == {"ok"}
    assert lines["server"] == [("ok", f"{api.endpoint} is Kubeflow Pipelines 2.17.0")]
    for check in CHECKS:
        assert lines[check] == [("ok", f"{check} is right")], "said once for all pods that say the same"
    assert lines["secret"] == [("ok", "adapt-pruner has AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")]
    assert lines["config map"] == [("ok", "adapt-pruner has AWS_ENDPOINT_URL, MLFLOW_TRACKING_URI")]
    ((_, fit),) = lines["nodes"]
    assert len(fit.removeprefix("there are nodes for ").split(", ")) == 10
    assert lines["retries"][0][1].startswith("failed tasks and deleted pods are retried")
    assert api.runs == {}
    assert len(api.deleted) == 1, "the small pipeline leaves nothing behind"
    assert api.pipelines == api.versions == {}


def test_the_pods_are_those_of_the_run(api, recipe, submission, tmp_path):
    """Compared with the compiled pipeline: everything but the program and the labels of the task."""
    api.frames = [ended(*PODS)]
    doctor(api)
    sent = api.deleted[0]["pipeline_spec"]
    (tmp_path / "run.yaml").write_bytes(submission.package.content)
    run, run_platform = parse(tmp_path / "run.yaml")
    (tmp_path / "sent.yaml").write_text("---\n".join(json.dumps(sent[k]) + "\n" for k in sorted(sent)))
    sent, sent_platform = parse(tmp_path / "sent.yaml")
    assert list(problems(sent)) == []
    assert set(sent.root.dag.tasks) == set(PODS)
    for pod in PODS:
        ours, theirs = executors(sent)[f"exec-{pod}"].container, executors(run)[f"exec-{pod}"].container
        assert "run_check_pod" in ours.command[-1]
        for each in (ours, theirs):
            for field in ("command", "args"):
                each.ClearField(field)
        assert ours == theirs
        configs = [
            platform.platforms["kubernetes"].deployment_spec.executors[f"exec-{pod}"]
            for platform in (sent_platform, run_platform)
        ]
        for config in configs:
            del config["podMetadata"]
        assert configs[0] == configs[1]
        assert not sent.root.dag.tasks[pod].HasField("retry_policy")
        assert not sent.root.dag.tasks[pod].caching_options.enable_cache


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("image", "it holds version 0.0.9 of adapt-pruner, and this command is 0.1.0. Build it."),
        ("credentials", "the pod lacks AWS_ACCESS_KEY_ID: create the secret."),
        ("store", "s3://models/pruning cannot be written: there is no bucket models. Create it."),
        ("mlflow", "MLflow at http://mlflow:5000 cannot be reached. Start the server."),
        ("accelerators", "the pod was given 1 of nvidia.com/gpu, and PyTorch sees 0: check the driver."),
        ("/dev/shm", "has 64 MB of the 1.1 GB of cluster.shared_memory. Raise cluster.memory."),
        ("scratch", "/scratch cannot be written (Permission denied). Set fsGroup."),
    ],
)
@pytest.mark.parametrize("archived", [True, False], ids=["by its log", "without a log"])
def test_what_one_pod_finds_wrong_is_told(api, recipe, check, said, archived):
    """Where KFP cannot give logs, by the words that Kubernetes keeps of a failed container."""
    wrong = {"check": check, "state": "fix", "said": said}
    if archived:
        api.logs = {"calibrate": findings(**{check: wrong}), "finalize": findings()}
    words = f"main: Error (exit code 1): error: {check}: {said} "
    nodes = [task("root.calibrate", "Failed", words), task("root.finalize", "Succeeded")]
    api.frames = [frame("FAILED", *nodes)]
    result = doctor(api)
    assert fixes(result) == [f"{check}: calibrate: {said}"]
    assert len(api.deleted) == 1


def test_two_things_in_the_words_of_a_container_are_two_lines(api, recipe):
    words = (
        "Error (exit code 1): error: store: it answers 500. Check it. error: mlflow: it is away. Start it."
    )
    api.frames = [frame("FAILED", *(task(f"root.{pod}", "Failed", words) for pod in PODS))]
    assert fixes(doctor(api)) == ["store: it answers 500. Check it.", "mlflow: it is away. Start it."]


@pytest.mark.parametrize("seen_by", ["Argo", "Kubernetes"])
def test_an_image_that_cannot_be_pulled_ends_the_wait(api, recipe, kubernetes, seen_by):
    """Such a run stays RUNNING for ever in Kubeflow Pipelines."""
    said = PULL if seen_by == "Argo" else ""
    waits = frame("RUNNING", *(task(f"root.{pod}", "Pending", said) for pod in PODS), policy="Always")
    api.frames = [waits]
    arguments = []
    if seen_by == "Kubernetes":
        cluster, kubeconfig = kubernetes
        arguments = ["--kubeconfig", kubeconfig]
        for pod in PODS:
            add_waiting_pod(cluster, api, pod)
        api.hook = lambda request: label_pods(cluster, api)
    result = doctor(api, "--timeout", "1h", *arguments)
    lines = [line for line in fixes(result) if line.startswith("pods")]
    assert len(lines) == 2
    for pod in PODS:
        (line,) = [each for each in lines if f"pods: {pod}: its image cannot be pulled (" in each]
        assert "failed to resolve reference" in line
        assert line.endswith(
            "Correct cluster.image, push it, or give the namespace's service account the registry's secret."
        )
    assert len(api.deleted) == 1, "or its pods would wait for ever"


def add_waiting_pod(cluster, api, component):
    name = f"adapt-pruner-x-{component}"
    waiting = {"reason": "ErrImagePull", "message": "failed to pull"}
    container = {"name": "main", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    labels = {"adapt-pruner/component": component, "pipeline/runid": "?"}
    cluster.add(
        "pods",
        {
            "metadata": {"name": name, "namespace": "kubeflow", "labels": labels},
            "status": {
                "phase": "Pending",
                "containerStatuses": [container | {"state": {"waiting": waiting}}],
            },
        },
    )
    for kind, said in (
        ("Normal", "Pulling image"),
        ("Warning", "Error: ErrImagePull"),
        ("Warning", "Failed to pull image: rpc error: code = NotFound desc = failed to resolve reference"),
    ):
        involved = {"kind": "Pod", "name": name, "namespace": "kubeflow"}
        metadata = {"name": f"{name}.{len(cluster.objects['events'])}", "namespace": "kubeflow"}
        cluster.add(
            "events", {"metadata": metadata, "involvedObject": involved, "type": kind, "message": said}
        )


def label_pods(cluster, api):
    for pod in cluster.objects["pods"]:
        pod["metadata"]["labels"]["pipeline/runid"] = next(iter(api.runs), "?")


@pytest.mark.parametrize(("failures", "left"), [(2, False), (9, True)])
def test_the_small_pipeline_is_deleted_even_if_the_server_is_slow(api, recipe, failures, left):
    def busy(request):
        if request.startswith("DELETE") and api.asked("DELETE") <= failures:
            raise Refused(503, "try again")

    api.frames, api.hook = [ended(*PODS)], busy
    result = doctor(api)
    assert result.exit_code == 0
    assert len(api.runs) == left
    notes = [said for state, said in table(result).get("pods", ()) if state == "note"]
    assert bool(notes) == left
    if left:
        (run,) = api.runs
        assert notes[0].endswith(f"Delete the doctor's run: {api.endpoint}/#/runs/details/{run}")


def test_an_image_that_comes_after_all_is_waited_for(api, recipe, monkeypatch):
    monkeypatch.setattr("pipelines.remote.doctor._IMAGE_S", 10)
    api.frames = [frame("RUNNING", *(task(f"root.{pod}", "Pending", PULL) for pod in PODS))] * 5
    api.frames.append(ended(*PODS))
    assert doctor(api).exit_code == 0


def test_a_pod_that_no_node_has_room_for_is_waited_for_until_the_timeout(api, recipe):
    said = "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    api.frames = [
        frame("RUNNING", task("root.calibrate", "Pending", said), task("root.finalize", "Succeeded"))
    ]
    api.logs = {"finalize": findings()}
    result = doctor(api, "--timeout", "0.2s")
    assert fixes(result) == [
        f"pods: calibrate: no node has room for it ({said.rstrip('.')}). Lower "
        "cluster.components.calibrate.gpus, cluster.components.calibrate.cpu or "
        "cluster.components.calibrate.memory, correct cluster.components.calibrate.gpu_type, or add nodes."
    ]
    assert table(result)["store"] == [("ok", "store is right")], "one pod is enough for the store"
    assert api.asked("GET /runs/") > 1


def test_a_driver_that_fails_is_told_as_such(api, recipe):
    api.frames = [
        frame("FAILED", driver("root.calibrate", "Failed", "exit code 1"), task("root.finalize", "Succeeded"))
    ]
    (line,) = fixes(doctor(api))
    assert line.startswith("pods: calibrate's driver failed: exit code 1.")


def test_a_driver_above_the_tasks_that_waits_for_its_image_ends_the_wait(api, recipe):
    api.frames = [frame("RUNNING", driver("root", "Pending", PULL))]
    (line,) = fixes(doctor(api, "--timeout", "1h"))
    assert line.startswith("pods: root's driver: its image cannot be pulled (ImagePullBackOff")


def test_what_an_image_of_another_version_says_is_read_as_far_as_it_is_known(api, recipe):
    api.logs = {
        "calibrate": findings().replace('"mlflow"', '"quantum"'),
        "finalize": f"{MARK}[{{}}]\n{MARK}5",
    }
    api.frames = [ended(*PODS)]
    lines = table(doctor(api))
    assert "quantum" not in lines
    assert lines["store"] == [("ok", "calibrate: store is right")]
    assert lines["pods"] == [("ok", "they find all that they look for")]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("error: ModuleNotFoundError: No module named 'core.steps.check_pod'", "holds an older version"),
        ("main: Error (exit code 1)", "Its log is in the UI"),
    ],
)
def test_an_image_of_another_program_is_named(api, recipe, message, said):
    api.frames = [ended(*PODS, state="FAILED", phase="Failed", message=message)]
    lines = fixes(doctor(api))
    assert len(lines) == 2
    assert all(said in line and "Build it from docker/Dockerfile" in line for line in lines)
    assert bool(api.deleted) == ("older" in said), "a log that has to be read is kept"


def test_the_state_of_the_run_is_enough_where_the_older_api_is_missing(api, recipe):
    api.old = False
    api.frames = [frame("RUNNING"), frame("SUCCEEDED")]
    assert doctor(api).exit_code == 0
    api.frames = [frame("FAILED")]
    assert all("Its log is in the UI" in line for line in fixes(doctor(api)))
    api.frames = [frame("RUNNING")]
    (line, _) = fixes(doctor(api, "--timeout", "0.1s"))
    assert line == (
        "pods: calibrate has told nothing within 0.1 s. "
        "Give more time by --timeout, or see `kubectl describe pod`."
    )


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [("2.17.0", "ok", "2.17.0"), ("2.5.0", "note", "older than kfp 2."), ("unknown", "ok", "does not say")],
)
def test_the_server_and_its_version(api, recipe, version, state, said):
    api.version, api.frames = version, [ended(*PODS)]
    ((found, text),) = table(doctor(api))["server"]
    assert found == state
    assert said in text


@pytest.mark.parametrize(("policy", "state"), [("Always", "ok"), ("OnError", "note"), ("", "note")])
def test_what_is_retried_here(api, recipe, policy, state):
    api.frames = [ended(*PODS, policy=policy)]
    result = doctor(api)
    ((found, text),) = table(result)["retries"]
    assert (found, result.exit_code) == (state, 0)
    assert f"Argo's retryPolicy is {policy or 'OnFailure'} here" in text


def test_json_holds_all_that_the_lines_say(api, recipe):
    api.frames = [ended(*PODS, state="FAILED", phase="Failed", message="error: store: it is away. Start it.")]
    lines, result = table(doctor(api)), doctor(api, "--json")
    assert result.exit_code == 1
    found = {}
    for each in json.loads(result.stdout):
        found.setdefault(each["check"], []).append((each["state"], each["said"]))
    assert found == lines


@pytest.mark.parametrize("wrong", [False, True])
def test_a_schedule_is_checked_before_it_is_set(api, recipe, wrong):
    def schedule(*more):
        return CliRunner().invoke(
            main, ["schedule", recipe, "--cron", "0 0 2 * * *", "--host", api.endpoint, *more]
        )

    message = "error: store: it is away. Start it."
    api.frames = [ended(*PODS, state="FAILED", phase="Failed", message=message) if wrong else ended(*PODS)]
    result = schedule()
    assert result.exit_code == wrong, result.output
    assert len(api.recurring) == (not wrong)
    assert len(api.deleted) == 1
    assert bool(re.search("^fix   store +it is away. Start it.$", result.stderr, re.MULTILINE)) == wrong
    if wrong:
        assert result.stderr.splitlines()[-1] == (
            "error: no run was started and no schedule changed: 1 of the checks above say what to fix. "
            "Do that, or give --no-check."
        )
        assert schedule("--no-check").exit_code == 0
        assert len(api.recurring) == len(api.deleted) == 1
    else:
        assert "unchanged" in schedule().stdout
        assert len(api.deleted) == 1, "what changes nothing need not be checked"
        assert "updated" in schedule("--set", "seed=5").stdout
        assert len(api.deleted) == 2


def test_submit_checks_where_it_is_asked_to(api, recipe):
    command = ["submit", recipe, "--host", api.endpoint, "--check"]
    api.frames = [ended(*PODS, state="FAILED", phase="Failed", message="error: image: it is old. Build it.")]
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, api.runs) == (1, {})
    api.frames = [ended(*PODS)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (run,) = api.runs.values()
    assert result.stdout == f"{api.endpoint}/#/runs/details/{run['run_id']}\n"


@pytest.mark.parametrize("option", ["--timeout", "--every"])
def test_times_must_be_times(api, recipe, option):
    assert doctor(api, option, "0").exit_code == 2
    assert api.requests == []
