"""A stand-in for the Kubernetes API on a loopback port, as much of it as a person's kubeconfig is used for.

What it keeps are whole objects, read by Kubernetes' own models: no field that the real API would not have.
Lists come in pages, selectors are applied, and what an account must not do is refused.
"""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes.client import models

from tests.support.openapi import misfits

_KINDS = {
    "secrets": "V1Secret",
    "configmaps": "V1ConfigMap",
    "nodes": "V1Node",
    "pods": "V1Pod",
    "events": "CoreV1Event",
}
_PAGE = 2  # as few as make everybody turn pages


@dataclass(kw_only=True)
class KubernetesApi:
    """A running stand-in, and its objects by resource."""

    address: str = ""
    objects: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [] for kind in _KINDS})
    forbidden: set[str] = field(default_factory=set)
    """A verb and a resource each: ``list nodes``."""
    requests: list[str] = field(default_factory=list)

    def add(self, resource: str, body: dict[str, Any]) -> dict[str, Any]:
        assert not list(misfits(models, _KINDS[resource], body, resource))
        self.objects[resource].append(body)
        return body

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        parts = path.removeprefix("/api/v1/").split("/")
        namespace = parts.pop(1) if parts[0] == "namespaces" else ""
        resource, name = parts[-2:] if len(parts) == 2 + bool(namespace) else (parts[-1], "")
        verb = f"{'get' if name else 'list'} {resource}"
        self.requests.append(verb)
        if verb in self.forbidden:
            return 403, {"kind": "Status", "code": 403, "message": f"{resource} is forbidden: you cannot"}
        found = [
            each
            for each in self.objects[resource]
            if each["metadata"].get("namespace", "") == namespace and _selected(each, query)
        ]
        if name:
            found = [each for each in found if each["metadata"]["name"] == name]
            return (
                (200, found[0]) if found else (404, {"kind": "Status", "code": 404, "message": "not found"})
            )
        assert not set(query) - {"limit", "continue", "labelSelector", "fieldSelector"}
        start = int(query.get("continue") or 0)
        more = {"continue": str(start + _PAGE)} if found[start + _PAGE :] else {}
        return 200, {"kind": "List", "metadata": more, "items": found[start : start + _PAGE]}


def _selected(each: dict[str, Any], query: dict[str, str]) -> bool:
    for label in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = label.partition("=")
        if each["metadata"].get("labels", {}).get(key) != value:
            return False
    for selected in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = selected.partition("=")
        assert key == "involvedObject.name", "a field that events can be selected by"
        if each["involvedObject"]["name"] != value:
            return False
    return True


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[KubernetesApi, Path]]:
    """Serve on a free port of loopback; the path is that of a kubeconfig, whose context is ``there``."""
    api = KubernetesApi()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            split = urlsplit(self.path)
            query = {key: value for key, (value,) in parse_qs(split.query).items()}
            status, said = api.answer(split.path, query)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        config = folder / "kubeconfig"
        config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "there", "cluster": {"server": api.address}}],
                    "users": [{"name": "me", "user": {"token": "abc"}}],
                    "contexts": [{"name": "there", "context": {"cluster": "there", "user": "me"}}],
                    "current-context": "there",
                }
            )
        )
        try:
            yield api, config
        finally:
            server.shutdown()
