"""A stand-in for the API of Kubeflow Pipelines (v2beta1) on a loopback port.

It keeps what kfp's own client uploads and creates, and is as strict as the real one, or stricter: bodies are
read by the models of ``kfp_server_api``, pipelines by the protocol buffers of the IR, and parameters by the
pipeline.
"""

import base64
import contextlib
import datetime
import email
import email.policy
import http.server
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.support.argo import Node, task_details, workflow
from tests.support.kfp_models import Refused, check, check_parameters, found, is_cron, only, parse, strict

_ROOT = "/apis/v2beta1"
_PAGE = 2  # as few as make everybody turn pages
_LISTS = {"page_token", "page_size", "sort_by", "filter", "namespace"}


class Cut(Exception):
    """The connection ends without an answer."""


def frame(state: str, *tasks: list[Node], error: str = "", **more: Any) -> dict[str, Any]:
    """What both APIs say of a run at one time: its state, and Argo's workflow of these tasks."""
    manifest = workflow([node for nodes in tasks for node in nodes], **more) if tasks or more else None
    return frame_of(state, manifest) | ({"error": {"code": 13, "message": error}} if error else {})


def frame_of(state: str, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """The same of a whole manifest, of which there is none before Argo has seen it."""
    return {"state": state, "manifest": manifest or {}}


@dataclass(kw_only=True)
class KfpApi:
    """A running stand-in, and all that it keeps: each by its id, as the API tells of it."""

    endpoint: str = ""
    multi_user: bool = False
    version: str = "2.17.0"
    """What the server calls itself; builds of one's own say unknown."""
    tokens: tuple[str, ...] = ()
    """Tokens that are let in; none lets everybody in."""
    cookie: str = ""
    prefix: str = ""
    """Where the API lies on the server."""
    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploads: list[bytes] = field(default_factory=list)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    recurring: dict[str, dict[str, Any]] = field(default_factory=dict)
    frames: list[dict[str, Any]] = field(default_factory=list)
    """What a run comes to, from question to question; the last one stays."""
    logs: dict[str, str] = field(default_factory=dict)
    """What the pod of a task has logged, by the name of the task; of others nothing is kept."""
    deleted: list[dict[str, Any]] = field(default_factory=list)
    """Runs that were deleted."""
    requests: list[str] = field(default_factory=list)
    old: bool = True
    """Whether the older API, v1beta1, is served."""
    hook: Callable[[str], None] = lambda request: None
    """Called with each request (``POST /runs``) before it is answered; may raise ``Refused`` or ``Cut``."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def asked(self, start: str) -> int:
        """Return how many requests began like that."""
        return sum(request.startswith(start) for request in self.requests)

    def spec(self, version_id: str) -> pipeline_spec_pb2.PipelineSpec:
        """Return the pipeline of a version."""
        return json_format.ParseDict(
            self.versions[version_id]["pipeline_spec"]["pipeline_spec"], pipeline_spec_pb2.PipelineSpec()
        )

    def fire(self, recurring_id: str) -> dict[str, Any] | None:
        """Start what the time has come for, as the controller of schedules does."""
        schedule = self.recurring[recurring_id]
        own = [run for run in self.runs.values() if run.get("recurring_run_id") == recurring_id]
        busy = sum(run["state"] not in ("SUCCEEDED", "FAILED") for run in own)
        if schedule["status"] != "ENABLED" or busy >= int(schedule["max_concurrency"]):
            return None
        names = ("experiment_id", "pipeline_version_reference", "runtime_config")
        body = {"display_name": schedule["display_name"], **{name: schedule[name] for name in names}}
        run = self.create_run(body)
        run["recurring_run_id"] = recurring_id
        return run

    def new_id(self) -> str:
        return f"{next(self._numbers):08x}-0000-4000-8000-000000000000"

    def upload(self, query: dict[str, str], content: bytes) -> dict[str, Any]:
        only(query, {"name", "display_name", "description", "pipelineid"})
        pipeline = found(self.pipelines, query.get("pipelineid", ""), "Pipeline")
        name = query["name"]
        if any(
            v["pipeline_id"] == pipeline["pipeline_id"] and v["name"] == name for v in self.versions.values()
        ):
            raise Refused(409, f"Already exist error: pipeline version with name {name} already exists")
        documents = list(yaml.load_all(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        parse(documents)
        self.uploads.append(content)
        return self._keep(
            self.versions,
            "pipeline_version_id",
            {
                "pipeline_id": pipeline["pipeline_id"],
                "name": name,
                "display_name": query.get("display_name", name),
                "pipeline_spec": dict(zip(("pipeline_spec", "platform_spec"), documents, strict=False)),
            },
        )

    def create_pipeline(self, body: Any) -> dict[str, Any]:
        data = strict(body, "V2beta1Pipeline")
        place = (data.get("namespace", ""), data["display_name"])
        if any((p.get("namespace", ""), p["display_name"]) == place for p in self.pipelines.values()):
            raise Refused(409, f"Already exist error: the pipeline {place[1]} already exists")
        return self._keep(self.pipelines, "pipeline_id", data)

    def create_experiment(self, body: Any) -> dict[str, Any]:
        data = strict(body, "V2beta1Experiment")
        self.check_namespace(data.get("namespace", ""))
        if any(e["display_name"] == data["display_name"] for e in self.experiments.values()):
            raise Refused(409, f"Already exist error: experiment {data['display_name']} already exists")
        return self._keep(self.experiments, "experiment_id", data | {"storage_state": "AVAILABLE"})

    def create_run(self, body: Any) -> dict[str, Any]:
        data = strict(body, "V2beta1Run")
        wanted = {"experiment_id", "display_name", "pipeline_version_reference", "runtime_config"}
        self.check_job(data, wanted | {"service_account", "pipeline_spec"})
        frames = self.frames or [frame("PENDING"), frame("RUNNING"), frame("SUCCEEDED")]
        run = self._keep(self.runs, "run_id", data | {"state": "PENDING"})
        run |= {"frames": iter(frames), "manifest": {}}
        return run

    def create_recurring(self, body: Any) -> dict[str, Any]:
        data = strict(body, "V2beta1RecurringRun")
        wanted = {"experiment_id", "display_name", "pipeline_version_reference", "runtime_config", "mode"}
        wanted |= {"trigger", "max_concurrency", "no_catchup", "description", "service_account"}
        self.check_job(data, wanted)
        trigger = data["trigger"]
        if set(trigger) != {"cron_schedule"} or not is_cron(trigger["cron_schedule"].get("cron", "")):
            raise Refused(400, f"Invalid input error: Schedule cron is not supported: {trigger}")
        if not 1 <= int(data["max_concurrency"]) <= 10:
            raise Refused(400, "Invalid input error: The max concurrency must be in range [1, 10]")
        status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[data.pop("mode")]
        experiment = self.experiments[data["experiment_id"]]
        data |= {"status": status, "namespace": experiment.get("namespace", "")}
        data["max_concurrency"] = str(data["max_concurrency"])  # as JSON has 64 bits
        return self._keep(self.recurring, "recurring_run_id", data)

    def check_job(self, data: dict[str, Any], known: set[str]) -> None:
        """Refuse a run whose experiment, pipeline or parameters are not right."""
        if extra := set(data) - known:
            raise Refused(400, f"Invalid input error: {', '.join(sorted(extra))} not expected here")
        if not data.get("display_name"):
            raise Refused(400, "Invalid input error: The name is empty. Please specify a valid name")
        experiment = found(self.experiments, data.get("experiment_id", ""), "Experiment")
        if experiment["storage_state"] == "ARCHIVED":
            raise Refused(400, "Invalid input error: the experiment is archived")
        if ("pipeline_spec" in data) == ("pipeline_version_reference" in data):
            raise Refused(400, "Invalid input error: either a pipeline or the version of one")
        if "pipeline_spec" in data:
            spec = parse([data["pipeline_spec"]["pipeline_spec"], data["pipeline_spec"]["platform_spec"]])
        else:
            reference = data["pipeline_version_reference"]
            version = found(self.versions, reference.get("pipeline_version_id", ""), "PipelineVersion")
            if version["pipeline_id"] != reference.get("pipeline_id"):
                raise Refused(400, "Invalid input error: the version is none of the pipeline")
            spec = self.spec(version["pipeline_version_id"])
        check_parameters(spec, data["runtime_config"].get("parameters", {}))

    def check_namespace(self, namespace: str) -> None:
        if self.multi_user and not namespace:
            raise Refused(400, "Invalid input error: Namespace is empty")
        if not self.multi_user and namespace:
            raise Refused(400, "Invalid input error: In single-user mode, the namespace must be empty")

    def listing(self, kept: dict[str, dict[str, Any]], name: str, query: dict[str, str]) -> dict[str, Any]:
        """Return a page of what the filter lets through."""
        rows = list(kept.values())
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", ()):
            only(predicate, {"operation", "key", "stringValue"})
            if predicate["operation"] not in ("EQUALS", 1) or predicate["key"] not in (
                "display_name",
                "name",
            ):
                raise Refused(400, f"Invalid input error: cannot filter by {predicate}")
            rows = [row for row in rows if row[predicate["key"]] == predicate["stringValue"]]
        start = int(query.get("page_token") or 0)
        end = start + min(_PAGE, int(query.get("page_size", "10")))
        answer: dict[str, Any] = {"total_size": len(rows)}
        if rows[start:end]:  # the real one leaves an empty list out
            answer[name] = rows[start:end]
        return answer | ({"next_page_token": str(end)} if rows[end:] else {})

    def _keep(self, kept: dict[str, dict[str, Any]], key: str, data: dict[str, Any]) -> dict[str, Any]:
        id_ = self.new_id()
        now = datetime.datetime.now(datetime.UTC).isoformat()
        kept[id_] = {key: id_, "created_at": now, **data}
        return kept[id_]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        """Return what a request comes to."""
        match = re.fullmatch(r"/(\w+)(?:/([\w-]+))?(?:/(versions))?(?::(\w+))?", path)
        kind, id_, versions, verb = match.groups() if match else ("", None, None, None)
        case = (method, kind + ("/versions" if versions else ""), verb or ("one" if id_ else "all"))
        if case[:2] == ("GET", "healthz"):
            return {"multi_user": self.multi_user, "tag_name": self.version, "commit_sha": "unknown"}
        if case == ("GET", "pipelines", "all"):
            only(query, _LISTS)
            place = query.get("namespace", "")
            kept = {k: p for k, p in self.pipelines.items() if p.get("namespace", "") == place}
            return self.listing(kept, "pipelines", query)
        if case == ("POST", "pipelines", "all"):
            return self.create_pipeline(body)
        if case == ("POST", "pipelines", "one") and id_ == "upload_version":
            return self.upload(query, body)
        if case == ("GET", "pipelines/versions", "one"):
            only(query, _LISTS - {"namespace"})
            kept = {k: v for k, v in self.versions.items() if v["pipeline_id"] == id_}
            return self.listing(kept, "pipeline_versions", query)
        if case == ("GET", "experiments", "all"):
            only(query, _LISTS)
            self.check_namespace(query.get("namespace", ""))
            return self.listing(self.experiments, "experiments", query)
        if case == ("POST", "experiments", "all"):
            return self.create_experiment(body)
        if case == ("POST", "runs", "all"):
            return self.create_run(body)
        if case == ("GET", "runs", "all"):
            only(query, _LISTS | {"experiment_id"})
            check(query.get("sort_by") == "created_at desc", "this is all that anybody needs")
            newest = sorted(self.runs.items(), key=lambda item: item[1]["created_at"], reverse=True)
            kept = {k: run for k, run in newest if run["experiment_id"] == query.get("experiment_id")}
            return self.listing(kept, "runs", query)
        if case == ("GET", "runs", "one"):
            return self.advance(found(self.runs, id_, "Run"))
        if case == ("POST", "runs", "terminate"):
            run = found(self.runs, id_, "Run")
            if run["state"] in ("SUCCEEDED", "FAILED"):
                raise Refused(400, "Invalid input error: Failed to terminate the run, which has ended")
            run["state"] = "CANCELING"
            return {}
        if case == ("DELETE", "runs", "one"):
            self.deleted.append(found(self.runs, id_, "Run"))
            del self.runs[str(id_)]
            return {}
        if match := re.fullmatch(r"/runs/([\w-]+)/nodes/([\w-]+)/artifacts/main-logs:read", path):
            return self.log(found(self.runs, match[1], "Run"), match[2])
        if kind == "recurringruns":
            return self.answer_recurring(method, id_, verb, query, body)
        raise Refused(404, "Not Found", body=b"404 page not found")

    def advance(self, run: dict[str, Any]) -> dict[str, Any]:
        """Let a run come to its next frame."""
        run |= next(run["frames"], {})
        history = run.setdefault("state_history", [])
        if not history or history[-1]["state"] != run["state"]:
            history.append({"state": run["state"]})
        if (details := task_details(run["manifest"])) is not None:  # packed nodes leave those of before
            run["run_details"] = {"task_details": details}
        return run

    def workflow(self, run_id: str) -> dict[str, Any]:
        """Return a run as the older API does: with Argo's workflow, as text."""
        check(self.old, "no such API")
        manifest = found(self.runs, run_id, "Run")["manifest"]
        runtime = {"workflow_manifest": json.dumps(manifest)} if manifest else {}
        return {"run": {"id": run_id}, "pipeline_runtime": {"pipeline_manifest": "{}"} | runtime}

    def log(self, run: dict[str, Any], node_id: str) -> dict[str, Any]:
        """Return the log of a pod that has ended, as the file in the object store that it is."""
        nodes = run["manifest"].get("status", {}).get("nodes", {}).values()
        (node,) = [each for each in nodes if each["id"] == node_id] or [None]
        if node is None or node["type"] != "Pod" or node["phase"] in ("Pending", "Running"):
            raise Refused(500, "", body=b'{"error_message": "no such artifact"}')
        logs = [text for task, text in self.logs.items() if f".{task}(0).executor" in node["name"]]
        if not logs:
            raise Refused(404, "", body=b'{"error_message": "artifact not found"}')
        return {"data": base64.b64encode(logs[0].encode()).decode()}

    def answer_recurring(
        self, method: str, id_: str | None, verb: str | None, query: dict[str, str], body: Any
    ) -> dict[str, Any]:
        if method == "POST" and id_ is None:
            return self.create_recurring(body)
        if method == "GET" and id_ is None:
            only(query, _LISTS | {"experiment_id"})
            self.check_namespace(query.get("namespace", ""))
            return self.listing(self.recurring, "recurringRuns", query)
        schedule = found(self.recurring, id_, "RecurringRun")
        if method == "DELETE":
            del self.recurring[schedule["recurring_run_id"]]
            return {}
        if method == "POST":
            schedule["status"] = {"enable": "ENABLED", "disable": "DISABLED"}[str(verb)]
            return {}
        return schedule


@contextlib.contextmanager
def run_kfp_api(**settings: Any) -> Iterator[KfpApi]:
    """Serve the API until the block ends."""
    api = KfpApi(**settings)

    class Handler(_Handler):
        served = api

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        try:
            yield api
        finally:
            server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    served: KfpApi
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        whole = address.path.removeprefix(self.served.prefix)
        path = whole.removeprefix(_ROOT)  # that of the older API stays
        request = f"{self.command} {path}"
        self.served.requests.append(request)
        try:
            self.served.hook(request)
            self._let_in()
            if older := re.fullmatch("/apis/v1beta1/runs/([\\w-]+)", whole):
                answer = self.served.workflow(older[1])
            else:
                check(address.path == self.served.prefix + whole and whole.startswith(_ROOT), "no such API")
                answer = self.served.answer(self.command, path, query, self._body(content))
        except Refused as refusal:
            self._send(refusal.status, refusal.body, refusal.headers)
        except Cut:
            self.close_connection = True
        else:
            rows = [answer, *answer.get("runs", ())]
            shown = [{k: v for k, v in row.items() if k not in ("frames", "manifest")} for row in rows]
            if "runs" in answer:
                shown[0]["runs"] = shown[1:]
            self._send(200, json.dumps(shown[0]).encode(), {"Content-Type": "application/json"})

    do_POST = do_DELETE = do_GET

    def _let_in(self) -> None:
        given = self.headers.get("authorization", "")
        if self.served.tokens and given not in [f"Bearer {token}" for token in self.served.tokens]:
            raise Refused(401, "", body=b"Jwt is expired")
        if self.served.cookie and self.headers.get("Cookie") != self.served.cookie:
            raise Refused(302, "", body=b"", headers={"Location": "/dex/auth?client_id=oidc"})

    def _body(self, content: bytes) -> Any:
        kind = self.headers.get("Content-Type", "")
        if not content or kind == "application/json":
            return json.loads(content or b"null")
        message = email.message_from_bytes(
            f"Content-Type: {kind}\r\n\r\n".encode() + content, policy=email.policy.HTTP
        )
        (part,) = message.iter_parts()
        disposition = part["Content-Disposition"].params
        check(disposition["name"] == "uploadfile", "the file must be called uploadfile")
        check(disposition["filename"].endswith(".yaml"), "not a YAML file")
        return part.get_payload(decode=True)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # the client may wait no longer
            self.end_headers()
            self.wfile.write(body)
