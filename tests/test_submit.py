"""Submitting to Kubeflow Pipelines: a real client against a strict stand-in of its API."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from google.protobuf import json_format

from core.errors import ClusterError, SettingsError
from core.recipe import load_recipe
from pipelines.cli import main
from pipelines.kfp_access import Access, connect
from pipelines.submit import Package, arguments_of, compile_package, prepare, slug, start, upload
from tests.evidence import note
from tests.kfp_api import Cut, Refused, frame, run_kfp_api, strict, task

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "name": "Trial run",
    "model": {"base": "organisation/model"},
    "prune": {"target": "50%", "phases": 1},
    "calibration": {"source": {"path": "organisation/texts"}},
    "storage": {"store": "s3://models/pruning"},
    "cluster": {"image": "registry.example/adapt-pruner-python@sha256:" + "0" * 64},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("KF_PIPELINES", "KFP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(RECIPE))
    return "trial.yaml"


@pytest.fixture
def api():
    with run_kfp_api() as running:
        yield running


@pytest.fixture
def submission(recipe):
    return prepare(load_recipe(Path(recipe)))


def submit(api, *arguments, recipe="trial.yaml"):
    host = ["--host", api.endpoint] if api is not None else []
    return CliRunner().invoke(main, ["submit", recipe, *host, *map(str, arguments)])


def error_of(result, status=1):
    """The one line that a failed command writes after its hints."""
    assert result.exit_code == status, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("hint: ", "version "))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    return lines[0].removeprefix("error: ")


def test_a_run_is_started_and_its_address_printed(api, recipe):
    result = submit(api, "--run-name", "first")
    assert result.exit_code == 0, result.output
    (run,) = api.runs.values()
    assert result.stdout == f"{api.endpoint}/#/runs/details/{run['run_id']}\n"
    assert run["display_name"] == "first"
    (pipeline,), (version,), (experiment,) = (
        list(kept.values()) for kept in (api.pipelines, api.versions, api.experiments)
    )
    assert pipeline["display_name"] == "adapt-pruner"
    assert experiment["display_name"] == "adapt-pruner"
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["pipeline_version_reference"] == {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    digest = hashlib.sha256(api.uploads[0]).hexdigest()[:12]
    assert version["display_name"] == f"trial-run-{digest}"
    assert result.stderr == f"version trial-run-{digest} of pipeline adapt-pruner: uploaded\n"
    assert api.asked("POST /runs") == 1


def test_nothing_in_the_pipeline_is_cached(api, recipe):
    """The client drops the switch for recurring runs: each task must carry it."""
    submit(api)
    spec = api.spec(next(iter(api.versions)))
    tasks = [each for part in (spec.root, *spec.components.values()) for each in part.dag.tasks.values()]
    assert len(tasks) > 10
    assert not any(each.caching_options.enable_cache for each in tasks)


def test_a_version_is_uploaded_once(api, recipe):
    for _ in range(3):
        assert submit(api).exit_code == 0
    assert "was there" in submit(api).stderr
    assert len(api.uploads) == len(api.versions) == len(api.pipelines) == len(api.experiments) == 1
    assert len(api.runs) == 4
    for name in ("a", "b", "c"):  # more versions than a page holds
        version = {"pipeline_id": next(iter(api.pipelines)), "name": name, "display_name": name}
        api.versions = {name: version | {"pipeline_version_id": name}, **api.versions}
    for seed in (0, 1, 1, 0):
        submit(api, f"--set=seed={seed}")
    assert len(api.uploads) == 2


def test_equal_settings_compile_to_equal_bytes_in_every_process(recipe, tmp_path):
    code = (
        "from pathlib import Path; from core.recipe import load_recipe\n"
        "from pipelines.submit import compile_package\n"
        "package = compile_package(load_recipe(Path('trial.yaml')))\n"
        "print(package.version, len(package.content))"
    )
    seen = set()
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        seen.add(
            subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            ).stdout
        )
    here = compile_package(load_recipe(Path(recipe)))
    assert seen == {f"{here.version} {len(here.content)}\n"}
    assert compile_package(load_recipe(Path(recipe), ("seed=1",))).version != here.version


def test_who_is_second_uses_what_the_first_has_made(api, submission):
    """Two submit at once: between looking and making, somebody else makes the same."""

    def rival(request):
        if request.startswith("POST /") and request != "POST /runs" and request not in done:
            done.append(request)
            other = connect(Access(host=api.endpoint))
            start(other, submission, run_name="rival", experiment="same")

    done = []
    client = connect(Access(host=api.endpoint))
    api.hook = rival
    started = start(client, submission, run_name="own", experiment="same")
    assert not started.uploaded
    assert len(api.pipelines) == len(api.versions) == len(api.experiments) == 1
    assert {"POST /pipelines"} <= set(done)
    note("Faults", "two submit the same recipe at once", "one version, and a run each")


@pytest.mark.parametrize("made", ["POST /pipelines", "POST /pipelines/upload_version", "POST /experiments"])
def test_each_thing_may_be_made_by_somebody_else_first(api, submission, made):
    def rival(request):
        if request == made and not busy:
            busy.append(request)
            start(connect(Access(host=api.endpoint)), submission, run_name="rival", experiment="same")

    busy = []
    client = connect(Access(host=api.endpoint))
    api.hook = rival
    start(client, submission, run_name="own", experiment="same")
    assert busy
    assert len(api.pipelines) == len(api.versions) == len(api.experiments) == 1
    assert len(api.runs) == 2


def test_of_two_pipelines_of_our_name_the_older_is_taken(api, submission):
    for id_, when in (
        ("b", "2026-01-02T00:00:00Z"),
        ("a", "2026-01-03T00:00:00Z"),
        ("c", "2026-01-01T00:00:00Z"),
    ):
        api.pipelines[id_] = {
            "pipeline_id": id_,
            "display_name": "adapt-pruner",
            "name": id_,
            "created_at": when,
        }
    client = connect(Access(host=api.endpoint))
    assert upload(client, submission.package)[0] == "c"
    assert upload(client, submission.package)[0] == "c"
    assert len(api.uploads) == 1


def test_a_name_becomes_one_that_kubernetes_takes():
    assert slug("Table 1: Llama-3.2") == "table-1-llama-3-2"
    assert slug("a" * 60) == "a" * 40
    assert slug("—") == "adapt-pruner"


def test_parameters_override_the_defaults_of_the_run(api, recipe):
    result = submit(
        api, "--param=target=40%", "--param=base_model=hf://organisation/other", "--param=revision=7"
    )
    assert result.exit_code == 0, result.output
    (run,) = api.runs.values()
    assert run["runtime_config"]["parameters"] == {
        "target": "40%",
        "base_model": "hf://organisation/other",
        "revision": "7",
    }


def test_all_that_is_wrong_with_parameters_is_told_before_the_cluster_is_asked(api, recipe):
    result = submit(
        api, "--param=tarket=40%", "--param=recipe=[1, 2]", "--param=target", "--param=phases=9", "--param==x"
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: --param tarket is no parameter of the pipeline. Did you mean target?",
        "error: --param recipe=[1, 2] must be a mapping. Correct it.",
        "error: --param target must read name=value, such as target=80%.",
        "error: --param phases is no parameter of the pipeline. Known: base_model, method, recipe, revision, "
        "target.",
        "error: --param =x must read name=value, such as target=80%.",
    ]
    assert api.requests == []
    note(
        "Faults",
        "unknown parameters and values of another type",
        "one line each, before the cluster is asked",
    )


@pytest.mark.parametrize(
    ("parameter", "problem"),
    [
        ("target=300%", "prune.target=300% must lie between 0% and 100%."),
        ("method=other", "prune.method=other must be one of adapt-pruner."),
        ("base_model=hf://model", "model.base=hf://model is no address on the hub."),
        ("base_model=", "model.base is empty."),
        ("recipe={seed: -1, calibration: {source: {path: a}}}", "seed=-1 must lie between"),
        ("recipe={calibration: {source: {path: a}}, sead: 1}", "sead is not a setting. Did you mean seed?"),
    ],
)
def test_values_of_parameters_follow_the_rules_of_settings(api, recipe, parameter, problem):
    assert problem in error_of(submit(api, f"--param={parameter}"), status=2)
    assert api.requests == []


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("STRING", "7", "7"),
        ("NUMBER_INTEGER", "7", 7),
        ("NUMBER_INTEGER", "7.5", None),
        ("NUMBER_INTEGER", "true", None),
        ("NUMBER_DOUBLE", "7", 7.0),
        ("NUMBER_DOUBLE", "x", None),
        ("BOOLEAN", "true", True),
        ("BOOLEAN", "1", None),
        ("STRUCT", "{a: 1}", {"a": 1}),
        ("STRUCT", "{a", None),
        ("LIST", "[1, a]", [1, "a"]),
        ("LIST", "a", None),
    ],
)
def test_values_are_read_by_the_type_in_the_ir(kind, text, value):
    parameters = {"it": {"parameterType": kind}}
    if value is None:
        with pytest.raises(SettingsError, match=r"--param it=.* must be .*\. Correct it\."):
            arguments_of(parameters, [f"it={text}"])
    else:
        found = arguments_of(parameters, [f"it={text}"])
        assert found == {"it": value}
        assert type(found["it"]) is type(value)


def test_a_parameter_without_a_default_must_be_given():
    parameters = {
        "one": {"parameterType": "STRING"},
        "two": {"parameterType": "STRING", "isOptional": True},
        "three": {"parameterType": "STRING", "defaultValue": ""},
    }
    with pytest.raises(SettingsError, match=r"^--param one is missing: .* Give it\.$"):
        arguments_of(parameters, [])


def test_places_of_this_machine_are_refused(api, recipe):
    result = submit(api, "--set=storage.store=output/store", "--set=tracking.uri=sqlite:///m.db")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: storage.store=output/store is a folder of this machine, which pods do not share. Give "
        "s3://bucket/prefix, or file:///folder if all pods mount a volume there.",
        "error: tracking.uri=sqlite:///m.db is a file of this machine, which pods do not share. Give the "
        "http:// address of an MLflow server, or leave it empty: cluster.config_map may name one.",
    ]
    assert api.requests == []


def test_what_may_be_meant_otherwise_is_a_hint(api, recipe, tmp_path):
    (tmp_path / "texts.txt").write_text("x")
    result = submit(
        api,
        "--set=cluster.image=registry.example/pruner:latest",
        "--set=storage.store=file:///mnt/store",
        "--set=calibration.source.path=texts.txt",
    )
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("hint: ")] == [
        "hint: cluster.image=registry.example/pruner:latest is a tag, which may change under a run. Pin it: "
        "NAME@sha256:DIGEST.",
        "hint: storage.store=file:///mnt/store must be one volume, mounted there in all pods.",
        "hint: calibration.source.path=texts.txt lies on this machine. Pods find it only if their image "
        "holds it, too.",
    ]


def test_only_the_host_is_asked_and_the_home_stays_as_it_is(api, recipe, tmp_path, monkeypatch):
    asked, connect_to = set(), socket.socket.connect

    def watched(self, address):
        asked.add(address)
        return connect_to(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    assert submit(api).exit_code == 0
    assert asked == {("127.0.0.1", int(api.endpoint.rpartition(":")[2]))}
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "submit", recipe]
    environment = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "KF_PIPELINES_ENDPOINT": api.endpoint,
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{api.endpoint}/#/runs/details/")
    assert list(home.rglob("*")) == []
    note("Security", "a run is submitted", "no other host is asked, nothing is written into the home")


@contextlib.contextmanager
def other_server(status, body):
    """Any web server that is not Kubeflow Pipelines."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_wrong_host_is_one_line(recipe, monkeypatch):
    page = b"<!doctype html><html><title>Welcome</title><script>x()</script>not here</html>"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        text = error_of(submit(None, "--host", f"http://127.0.0.1:{port}"))
        assert text == (
            f"http://127.0.0.1:{port} cannot be reached ([Errno 111] Connection refused). Check --host and "
            "the network."
        )
    text = error_of(submit(None, "--host", "http://no-such-host.invalid"))
    assert "cannot be reached" in text
    with other_server(404, page) as host:
        text = error_of(submit(None, "--host", host))
        assert (
            text
            == f"{host} has no API of Kubeflow Pipelines (404). Correct --host: it is the address of its UI."
        )
        assert "cannot be trusted" in error_of(submit(None, "--host", host.replace("http:", "https:")))
    with other_server(200, page) as host:
        assert "answers with a web page" in error_of(submit(None, "--host", host))
    with other_server(502, page) as host:
        assert error_of(submit(None, "--host", host)) == (
            f"{host} answers 502 (Welcome not here). Look at its server, and try again later."
        )
    monkeypatch.setattr("pipelines.kfp_access._TIMEOUT_S", (0.3, 0.3))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        text = error_of(submit(None, "--host", f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert "does not answer" in text
    note("Faults", "a host that is wrong in one of seven ways", "one line names it and what to do", 7)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--host is missing."),
        (["--host", "not an address"], "--host=not an address is no address."),
        (["--host", "https://me:secret@kubeflow"], "--host=https://me:***@kubeflow is no address."),
        (["--host", "http://"], "--host=http:// is no address."),
        (["--host", "http://h", "--token-file", "gone"], "--token-file=gone cannot be read (No such file"),
        (["--host", "http://h", "--token-file", "empty"], "--token-file=empty is not one line of text."),
        (["--host", "http://h", "--cookie-file", "two"], "--cookie-file=two is not one line of text."),
        (["--host", "http://h", "--ca-cert", "gone"], "--ca-cert=gone is no file."),
        (["--kube-context", "nowhere"], "--kube-context is not in the kubeconfig."),
        (["--host", "http://h", "--timeout", "1h"], "--timeout goes with --wait."),
        (["--host", "http://h", "--timeout", "soon", "--wait"], "--timeout=soon is no time."),
        (["--host", "http://h", "--every", "3 steps", "--wait"], "--every=3 steps is no time."),
    ],
)
def test_wrong_options_are_named(recipe, tmp_path, monkeypatch, options, problem):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("a=b\nc=d\n")
    assert problem in error_of(submit(None, *options), status=2)


def test_tokens_and_cookies_go_to_the_host(recipe, tmp_path, monkeypatch):
    with run_kfp_api(tokens=("good",)) as api:
        assert "refuses the login" in error_of(submit(api))
        (tmp_path / "token").write_text("good\n")
        assert submit(api, "--token-file", "token").exit_code == 0
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", "token")
        assert submit(api).exit_code == 0
        monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH")
        monkeypatch.setenv("KFP_EXISTING_TOKEN", "good")
        assert submit(api).exit_code == 0
        assert "both given" in error_of(submit(api, "--token-file", "token"), status=2)
        monkeypatch.setenv("KFP_EXISTING_TOKEN", "old\nX-Other: header")
        assert "holds blanks or line ends" in error_of(submit(api), status=2)
        monkeypatch.setenv("KFP_EXISTING_TOKEN", "expired")
        text = error_of(submit(api))
        assert text == (
            f"{api.endpoint} refuses the login: it is missing or has expired (Jwt is expired). Get a new "
            "one, and give it by --token-file, --cookie-file or KFP_EXISTING_TOKEN."
        )
    note("Faults", "an expired token", "one line says so and how to give a new one")
    monkeypatch.delenv("KFP_EXISTING_TOKEN")
    with run_kfp_api(cookie="authservice_session=abc") as api:
        text = error_of(submit(api))
        assert (
            "leads to /dex/auth?client_id=oidc. Give that as --host; if it is a login: Get a new one" in text
        )
        (tmp_path / "cookie").write_text("authservice_session=abc\n")
        assert submit(api, "--cookie-file", "cookie").exit_code == 0
    note("Faults", "a login that has run out", "one line says so and how to give a new one")


def test_secrets_are_shown_nowhere(recipe, monkeypatch):
    monkeypatch.setenv("KFP_EXISTING_TOKEN", "very-secret")
    with run_kfp_api(tokens=("other",)) as api:
        result = submit(api)
    assert "very-secret" not in result.output + repr(
        Access(token="very-secret", other_client_secret="very-secret")
    )
    note("Security", "a token that is refused", "it is in no message")


def test_several_users_have_namespaces(recipe):
    with run_kfp_api(multi_user=True) as api:
        assert "--namespace is missing: this Kubeflow serves several users." in error_of(
            submit(api), status=2
        )
        for _ in range(2):
            assert submit(api, "--namespace", "team").exit_code == 0
        (pipeline,), (experiment,) = api.pipelines.values(), api.experiments.values()
        assert pipeline["namespace"] == experiment["namespace"] == "team"
        assert len(api.uploads) == 1
    with run_kfp_api() as api:
        assert "In single-user mode" in error_of(submit(api, "--namespace", "team"))


QUOTA = (
    'pods "adapt-pruner-x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: '
    "8, limited: 8"
)
REFUSALS = {
    "a quota": (403, QUOTA, "Wait for other runs to end, ask for a larger quota, or lower cluster.gpus"),
    "a quota, told as an inner error": (500, QUOTA, "Wait for other runs to end"),
    "missing rights": (403, "User x is not authorized to create runs", "denies access"),
    "an argument": (400, "Invalid input error: the experiment is archived", "does not take it (400)"),
    "something that went": (404, "ResourceNotFoundError: Experiment e not found", "does not take it (404)"),
    "too many requests": (
        429,
        "slow down",
        "answers 429 (slow down). Look at its server, and try again later.",
    ),
    "an error of its own": (500, "Internal Server Error", "answers 500"),
    "a restart": (503, "no healthy upstream", "answers 503"),
    "a message that would steer a terminal": (500, "a\x1b[2Jb\nc" + "x" * 9000, "answers 500 (a [2Jb c"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_the_api_refuses_is_one_line(api, recipe, what):
    status, message, expected = REFUSALS[what]

    def refuse(request):
        if request == "POST /runs":
            raise Refused(status, message)

    api.hook = refuse
    text = error_of(submit(api))
    assert expected in text
    assert len(text) < 700
    assert api.asked("POST /runs") == 1
    note(
        "Faults",
        f"the API refuses a run for {what}",
        "one line says why and what to do; it is not sent again",
    )


def test_a_request_that_may_have_arrived_is_not_sent_again(api, recipe):
    def cut(request):
        if request == "POST /runs":
            raise Cut

    api.hook = cut
    text = error_of(submit(api))
    assert "cannot be reached" in text or "does not answer" in text
    assert api.asked("POST /runs") == 1
    note("Faults", "the connection ends while a run is started", "one line; no second run is started")


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
        task("evaluate", "FAILED", QUOTA),
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
    from pipelines.following import Patience, follow

    waiting = task("calibrate", "RUNNING", "ErrImagePull: manifest unknown")
    api.frames = [frame("RUNNING", waiting)]
    submission = prepare(load_recipe(Path(recipe)))
    client, seen = connect(Access(host=api.endpoint)), []
    run = start(client, submission, run_name="x", experiment="e")
    patience = Patience(poll_s=0.01, image_s=0.05)
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
    result = submit(api, "--wait", "--every", "0.01s")
    assert result.exit_code == 0
    assert result.stderr.count("no node has room for it") == 1


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
    with subprocess.Popen(
        [*command, "--every", "0.1s"], env=environment, stdout=-1, stderr=-1, text=True
    ) as process:
        while api.asked("GET /runs/") < 2:
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"error: interrupted; the run goes on: {out.strip()}"
    assert "Traceback" not in errors
    assert not any("terminate" in request or request.startswith("DELETE") for request in api.requests)


def test_a_terminal_shows_what_runs():
    import io

    from rich.console import Console

    from pipelines.following import Progress, TaskState
    from pipelines.run_view import RunView

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


BODIES = {
    "an unknown field": ({"display_name": "x", "enable_caching": True}, 'unknown field "enable_caching"'),
    "a number for a text": ({"display_name": 7}, "display_name=7 is not of type str"),
    "a text for a mapping": ({"runtime_config": "x"}, "is no V2beta1RuntimeConfig"),
    "a state that is none": ({"state": "DONE"}, "is none of"),
}


@pytest.mark.parametrize("what", BODIES)
def test_the_stand_in_is_strict(what):
    body, problem = BODIES[what]
    with pytest.raises(Refused, match=re.escape(problem)):
        strict(body, "V2beta1Run")


def test_the_stand_in_refuses_what_no_pipeline_is(api, submission):
    client = connect(Access(host=api.endpoint))
    broken = json.loads(json.dumps(next(yaml.safe_load_all(submission.package.content))))
    broken["root"]["dags"] = {}
    package = Package(content=yaml.safe_dump(broken).encode(), version="x", parameters={}, tasks={})
    with pytest.raises(ClusterError, match="does not take it"):
        upload(client, package)
    assert json_format.MessageToDict(api.spec(upload(client, submission.package)[1]))
