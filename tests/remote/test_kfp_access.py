"""Hosts, logins and refusals of Kubeflow Pipelines: one line each, and nothing sent where it should not."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import yaml
from kubernetes.config import kube_config

from pipelines.remote.client import connect
from tests.support.evidence import note
from tests.support.kfp_api import Cut, Refused, run_kfp_api
from tests.support.kfp_trial import NO_QUOTA_LEFT, error_of, submit

ROOT = Path(__file__).resolve().parents[2]


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
            == f"{host} has no API of Kubeflow Pipelines (404). Correct --host: give the address of its UI."
        )
        assert "cannot be trusted" in error_of(submit(None, "--host", host.replace("http:", "https:")))
    with other_server(200, page) as host:
        assert "answers with a web page" in error_of(submit(None, "--host", host))
    with other_server(502, page) as host:
        assert error_of(submit(None, "--host", host)) == (
            f"{host} answers 502 (Welcome not here). Check its server, and try again later."
        )
    monkeypatch.setattr("pipelines.remote.client._TIMEOUT_S", (0.3, 0.3))
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
        (["--host", "not an address"], "--host=not an address is not a valid address."),
        (["--host", "https://me:secret@kubeflow"], "--host=https://me:***@kubeflow is not a valid address."),
        (["--host", "http://"], "--host=http:// is not a valid address."),
        (["--host", "http://h", "--token-file", "gone"], "--token-file=gone cannot be read (No such file"),
        (["--host", "http://h", "--token-file", "empty"], "--token-file=empty is not one line of text."),
        (["--host", "http://h", "--cookie-file", "two"], "--cookie-file=two is not one line of text."),
        (["--host", "http://h", "--ca-cert", "gone"], "--ca-cert=gone is not a file."),
        (["--kube-context", "nowhere"], "--kube-context is not in the kubeconfig."),
        (
            ["--kube-context", "x", "--host", "http://h"],
            "--kube-context and --host (or KF_PIPELINES_ENDPOINT)",
        ),
        (
            ["--host", "http://h", "--client-id", "x", "--token-file", "two"],
            "--client-id and --token-file are",
        ),
        (["--host", "http://h", "--every", "0", "--wait"], "--every=0 leaves no pause between requests."),
        (["--host", "http://h", "--timeout", "1h"], "--timeout needs --wait."),
        (["--host", "http://h", "--every", "1min"], "--every needs --wait. Add it, or leave --every out."),
        (["--param", "recipe={name: 2026-99-99}"], "--param recipe={name: 2026-99-99} must be a mapping."),
        (["--host", "http://h", "--timeout", "soon", "--wait"], "--timeout=soon is not a time."),
        (["--host", "http://h", "--every", "3 steps", "--wait"], "--every=3 steps is not a time."),
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
        assert "contains spaces or line breaks" in error_of(submit(api), status=2)
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
            "redirects to /dex/auth?client_id=oidc. Give that as --host; if it is a login: Get a new one"
            in text
        )
        (tmp_path / "cookie").write_text("authservice_session=abc\n")
        assert submit(api, "--cookie-file", "cookie").exit_code == 0
    note("Faults", "a login that has run out", "one line says so and how to give a new one")


@pytest.mark.parametrize("address", ["{}", "{}/", "{}//"])
def test_a_slash_too_many_does_no_harm(api, recipe, address):
    result = submit(None, "--host", address.format(api.endpoint))
    assert result.stdout.startswith(f"{api.endpoint}/#/runs/details/0")


def test_addresses_of_all_kinds_are_tried(recipe, monkeypatch):
    monkeypatch.setattr("pipelines.remote.client._TIMEOUT_S", (0.2, 0.2))
    for host in ("http://[::1]:9", "http://127.0.0.1:9/pipeline", "127.0.0.1:9"):
        assert f"{host} cannot be " in error_of(submit(None, "--host", host))


def test_secrets_are_shown_nowhere(recipe, monkeypatch):
    monkeypatch.setenv("KFP_EXISTING_TOKEN", "very-secret")
    with run_kfp_api(tokens=("other",)) as api:
        result = submit(api)
    assert "very-secret" not in result.output
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


@pytest.mark.parametrize("namespace", ["", "team"])
def test_a_context_of_kubectl_leads_to_the_installation(recipe, tmp_path, monkeypatch, namespace):
    # The variable KUBECONFIG is read once a process.
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    prefix = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
    with run_kfp_api(multi_user=bool(namespace), prefix=prefix) as api:
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {"clusters": [{"name": "c", "cluster": {"server": api.endpoint}}], "contexts": [context]}
        config |= {"users": [{"name": "u", "user": {}}], "current-context": "x", "kind": "Config"}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        result = submit(None, "--kube-context", "x", *(["--namespace", namespace] if namespace else []))
        assert result.exit_code == 0, result.stderr
        (experiment,) = api.experiments.values()
        assert experiment.get("namespace", "") == namespace
        (run,) = api.runs
        assert result.stdout == f"{run} (set KF_PIPELINES_UI_ENDPOINT for a link)\n"
        monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/pipeline")
        result = submit(None, "--kube-context", "x", *(["--namespace", namespace] if namespace else []))
        assert result.stdout.startswith("https://kubeflow.example/pipeline/#/runs/details/")


def test_what_another_cluster_has_left_in_the_home_counts_for_nothing(recipe, tmp_path, monkeypatch):
    kept = {"namespace": "team", "client_authentication_cookie": "session=abc"}
    (tmp_path / "context.json").write_text(json.dumps(kept))
    monkeypatch.setattr("kfp.client.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    with run_kfp_api(cookie="session=abc") as api:
        assert submit(api).exit_code == 1
    with run_kfp_api() as api:
        assert submit(api).exit_code == 0
    assert json.loads((tmp_path / "context.json").read_text()) == kept


def test_a_host_without_a_scheme_is_https(recipe, monkeypatch):
    healthy = types.SimpleNamespace(data=b"{}", getheader=lambda name: "application/json")
    monkeypatch.setattr("kfp_server_api.rest.RESTClientObject.request", lambda *_, **__: healthy)
    client = connect(host="kubeflow.example/pipeline")
    assert client.place() == "https://kubeflow.example/pipeline"
    assert client.link("runs", "x") == "https://kubeflow.example/pipeline/#/runs/details/x"


def test_a_pod_of_the_cluster_has_the_namespace_that_it_runs_in(recipe, tmp_path, monkeypatch):
    (tmp_path / "namespace").write_text("team")
    monkeypatch.setattr("pipelines.remote.client._NAMESPACE_OF_POD", str(tmp_path / "namespace"))
    monkeypatch.setattr("kfp.client.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "home" / "context.json"))
    with run_kfp_api(multi_user=True) as api:
        assert submit(api).exit_code == 0
        assert [experiment["namespace"] for experiment in api.experiments.values()] == ["team"]
    assert not (tmp_path / "home").exists()


REFUSALS = {
    "a quota": (403, NO_QUOTA_LEFT, f"denies access ({NO_QUOTA_LEFT})"),
    "missing rights": (403, "User x is not authorized to create runs", "denies access"),
    "an argument": (400, "Invalid input error: the experiment is archived", "refuses the request (400)"),
    "something that went": (
        404,
        "ResourceNotFoundError: Experiment e not found",
        "refuses the request (404)",
    ),
    "too many requests": (
        429,
        "slow down",
        "answers 429 (slow down). Check its server, and try again later.",
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


def test_an_answer_that_does_not_come_is_not_waited_for(api, recipe, monkeypatch):
    monkeypatch.setattr("pipelines.remote.client._TIMEOUT_S", (0.5, 0.5))
    stop = threading.Event()
    api.hook = lambda request: request == "POST /runs" and stop.wait(20)
    text = error_of(submit(api))
    stop.set()
    assert (
        text == f"{api.endpoint} does not answer. Check in its UI whether it was done, and try again later."
    )
    assert api.asked("POST /runs") == 1
    note("Faults", "the API does not answer while a run is started", "one line; no second run is started")
