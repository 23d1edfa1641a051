"""A stand-in for the Hugging Face hub on a loopback port: what its client asks for to read repositories.

What it asks for to write to them is in ``tests.support.hub_uploads``.
"""

import contextlib
import hashlib
import http.server
import io
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_uploads import (
    READ_TOKEN,
    TOKEN,
    Cut,
    Hook,
    Lost,
    Refuse,
    Uploads,
    blob,
    is_large,
    nothing,
    object_id,
)

_API = re.compile(
    r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?"
)
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository; every branch or tag is a commit of its own."""

    branches: Mapping[str, Mapping[str, bytes]]
    """Branch or tag to path to content; ``main`` is what those get who name no revision."""
    private: bool = False
    """Whether it takes ``TOKEN`` to see it."""
    gated: bool = False
    """Whether all see it, but only ``TOKEN`` reads its files."""
    tags: tuple[str, ...] = ()
    """Those of ``branches`` that are tags."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that have arrived, by sha256, whether a commit names them or not."""
    summaries: list[str] = field(default_factory=list)
    """Messages of the commits that were made."""

    def commit(self, branch: str = "main") -> str:
        """Return the commit hash of a branch."""
        files = sorted((path, blob(content)) for path, content in self.branches[branch].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()

    def at(self, revision: str) -> Mapping[str, bytes] | None:
        """Return the files at a branch, a tag or a commit."""
        by_name = {self.commit(branch): files for branch, files in self.branches.items()} | dict(
            self.branches
        )
        return by_name.get(revision)


@dataclass(kw_only=True)
class Hub:
    """A running stand-in.

    Attributes:
        endpoint: For HF_ENDPOINT.
        requests: What was asked for, such as ``GET /datasets/a/b/resolve/main/x.jsonl``.
        datasets: Id to data set.
        models: Id to model.
        connections: All that were ever opened; ``/stop`` ends them.
        received: sha256 of the large files that were sent, in order; one that is sent twice stands twice.
        hook: Called with each request before it is answered; may raise ``Refuse``, ``Cut``
            or ``Lost``.
    """

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    datasets: dict[str, Repository]
    models: dict[str, Repository]
    connections: list[socket.socket] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    hook: Hook = nothing

    def environment(self, cache: str) -> dict[str, str]:
        """Return the variables that lead a client here, and its cache into a folder of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": cache,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def add_model(
        self, name: str, *, private: bool = False, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Make a repository, which starts with a commit of the hub's own."""
        start = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", **(files or {})}
        self.models[name] = Repository(branches={"main": start}, private=private)


@contextlib.contextmanager
def run_hub(
    *, datasets: Mapping[str, Repository] | None = None, models: Mapping[str, Repository] | None = None
) -> Iterator[Hub]:
    """Serve repositories until the block ends, or until someone asks for ``/stop``."""
    hub = Hub(datasets=dict(datasets or {}), models=dict(models or {}))

    class Handler(_Handler):
        served = hub

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(Uploads, http.server.BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.served.connections.append(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.served.requests.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        if address.path == "/stop":
            self.server.shutdown()
            self.server.server_close()  # from here on connections are refused
            self._send(200)
            for connection in self.served.connections:
                with contextlib.suppress(OSError):  # the client may have closed it
                    connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            self.served.hook(f"{self.command} {address.path}")
        except Refuse as refusal:
            self._refuse(refusal.status, refusal.code, str(refusal))
            return
        except Cut:
            self.close_connection = True
            return
        except Lost:
            self.close_connection, self.wfile = True, io.BytesIO()
        if self.command == "POST" and self.write(address.path, body):
            return
        if match := _API.fullmatch(address.path):
            self._api(*match.groups(), query=parse_qs(address.query), form=parse_qs(body.decode()))
        elif match := _RESOLVE.fullmatch(address.path):
            self._resolve(*match.groups())
        else:
            self._refuse(404, "EntryNotFound", "no such page")

    do_HEAD = do_POST = do_GET

    def _api(
        self,
        kind: str,
        name: str,
        what: str | None,
        revision: str | None,
        folder: str | None,
        *,
        query: dict[str, list[str]],
        form: dict[str, list[str]],
    ) -> None:
        repository = self._visible(kind, name)
        if repository is None:
            return
        if what == "refs":
            refs = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": repository.commit(branch)}
                for branch in repository.branches
            ]
            tags = [ref for ref in refs if ref["name"] in repository.tags]
            branches = [ref for ref in refs if ref not in tags]
            self._send_json({"branches": branches, "tags": tags, "converts": []})
            return
        files = self._files(repository, revision or "main")
        if files is None:
            return
        if what == "tree":
            prefix = f"{unquote(folder)}/" if folder else ""
            entries = _entries(
                files, prefix, recursive=query.get("recursive", ["false"])[0].lower() == "true"
            )
            if not entries:
                self._refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
                return
            self._send_json(entries)
        elif what == "paths-info":
            entries = [e for e in _entries(files, "", recursive=True) if e["path"] in form.get("paths", [])]
            self._send_json(entries)
        else:
            commit = repository.commit(_branch_of(repository, files))
            self._send_json(
                {
                    "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
                    "id": name,
                    "sha": commit,
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in files],
                }
            )

    def _resolve(self, dataset: str | None, name: str, revision: str, path: str) -> None:
        repository = self._visible("datasets" if dataset else "models", name)
        if repository is None:
            return
        if repository.gated and not self._authorized():
            self._refuse(401, "GatedRepo", f"Access to {name} is restricted")
            return
        files = self._files(repository, revision)
        if files is None:
            return
        headers = {"X-Repo-Commit": repository.commit(_branch_of(repository, files))}
        content = files.get(unquote(path))
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
            return
        headers |= {"ETag": f'"{blob(content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _visible(self, kind: str, name: str) -> Repository | None:
        """Find a repository; as the hub does, say 401 to who has no token, whether it is there or not."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        held = self.served.datasets if kind == "datasets" else self.served.models
        repository = held.get(name)
        if repository is not None and (self._authorized() or not repository.private):
            return repository
        if given is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")
        return None

    def _files(self, repository: Repository, revision: str) -> Mapping[str, bytes] | None:
        files = repository.at(unquote(revision))
        if files is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message} | dict(headers or {})
        self._send(status, json.dumps({"error": message}).encode(), named)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _branch_of(repository: Repository, files: Mapping[str, bytes]) -> str:
    return next(branch for branch, held in repository.branches.items() if held is files)


def _entries(files: Mapping[str, bytes], prefix: str, *, recursive: bool) -> list[dict[str, object]]:
    """List what lies below a folder, as the hub's tree does."""
    entries: dict[str, dict[str, object]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        folders = path.removeprefix(prefix).split("/")[:-1]
        above = [prefix + "/".join(folders[:depth]) for depth in range(1, len(folders) + 1)]
        for folder in above if recursive else above[:1]:
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or not folders:
            entries[path] = {"type": "file", "oid": blob(content), "size": len(content), "path": path}
            if is_large(path, content):
                pointer = {"oid": object_id(path, content), "size": len(content), "pointerSize": 134}
                entries[path] |= {"oid": "0" * 40, "lfs": pointer}
    return list(entries.values())
