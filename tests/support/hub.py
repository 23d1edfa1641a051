"""A stand-in for the Hugging Face hub: what its client asks for to read repositories and to upload.

Large files go to a storage of their own under signed addresses (git-lfs, basic transfer), small ones inside
the commit. As on the hub, a commit names its parent, and refuses large files that have not arrived.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.support.serving import Handler, serving

TOKEN = "hf_stand_in"
"""Opens private repositories, and may write to those of ``OWNER``."""
READ_TOKEN = "hf_reads_only"
OWNER = "team"
SIGNATURE = "X-Amz-Signature=5ecret"
LARGE_BYTES = 10_000_000


class Refuse(Exception):
    """Raised by ``Hub.hook``, too: the request is answered with this status."""

    def __init__(self, status, message, code="", headers=()):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers)


class Cut(Exception):
    """Raised by ``Hub.hook``: the connection breaks, in the middle of what is sent."""


class Lost(Exception):
    """Raised by ``Hub.hook``: the request is done, but its answer does not arrive."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository; every branch or tag is a commit of its own."""

    branches: dict[str, dict[str, bytes]]
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

    def commit(self, branch="main"):
        return commit_of(self.branches[branch])

    def at(self, revision):
        """Return the files at a branch, a tag or a commit."""
        by_name = {commit_of(files): files for files in self.branches.values()} | self.branches
        if revision not in by_name:
            raise Refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return by_name[revision]


@dataclass(kw_only=True)
class Hub:
    """A running stand-in."""

    endpoint: str = ""
    datasets: dict[str, Repository]
    models: dict[str, Repository]
    requests: list[str] = field(default_factory=list)
    """What was asked for, such as ``GET /datasets/a/b/resolve/main/x.jsonl``."""
    received: list[str] = field(default_factory=list)
    """sha256 of the large files that were sent, in order; one that is sent twice stands twice."""
    connections: list[socket.socket] = field(default_factory=list)
    """All that were ever opened; ``/stop`` ends them."""
    hook: object = lambda request: None
    """Called with each request before it is answered; may raise ``Refuse``, ``Cut`` or ``Lost``."""

    def environment(self, cache):
        """Return the variables that lead a client here, and its cache into a folder of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": cache,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def add_model(self, name, *, private=False, files=None):
        """Make a repository, which starts with a commit of the hub's own."""
        start = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", **(files or {})}
        self.models[name] = Repository(branches={"main": start}, private=private)


@contextlib.contextmanager
def run_hub(*, datasets=None, models=None):
    """Serve repositories until the block ends, or until someone asks for ``/stop``."""
    hub = Hub(datasets=dict(datasets or {}), models=dict(models or {}))
    with serving(_Handler, hub=hub) as hub.endpoint:
        yield hub


class _Handler(Handler):
    hub: Hub

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self):
        address, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        asked = f"{self.command} {address.path}"
        self.hub.requests.append(asked if self.command == "PUT" else f"{self.command} {self.path}")
        body = functools.cache(lambda: self.rfile.read(length))
        if address.path == "/stop":
            self.stop()
            return
        try:
            try:
                self.hub.hook(asked)
            except Lost:
                self.close_connection, self.wfile = True, io.BytesIO()
            answer = self.answer(address.path, address.query, body())
        except Cut:
            self.rfile.read(length // 2)
            self.close_connection = True
        except Refuse as refusal:
            body()
            named = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)} | refusal.headers
            self.reply(refusal.status, json.dumps({"error": str(refusal)}).encode(), named)
        else:
            if not isinstance(answer, tuple):
                answer = (200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            self.reply(*answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def stop(self):
        self.server.shutdown()
        self.server.server_close()  # from here on connections are refused
        self.reply(200)
        for connection in self.hub.connections:
            with contextlib.suppress(OSError):  # the client may have closed it
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, path, query, body):
        """Return a JSON value, or status, body and headers."""
        for pattern, name in _ROUTES:
            if match := re.fullmatch(pattern.replace("NAME", "([^/]+/[^/]+)"), path):
                return getattr(self, name)(*match.groups(), query=query, body=body)
        raise Refuse(404, "no such page", "EntryNotFound")

    # --- who may do what

    def token(self):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", TOKEN, READ_TOKEN):
            raise Refuse(401, "Invalid credentials in Authorization header")
        return given

    def visible(self, kind, name):
        """Find a repository; as the hub does, say 401 to who has no token, whether it is there or not."""
        token, held = self.token(), self.hub.datasets if kind == "datasets" else self.hub.models
        if name in held and (token == TOKEN or not held[name].private):
            return held[name]
        if not token:
            raise Refuse(401, "Invalid username or password.", "RepoNotFound")
        raise Refuse(404, "Repository not found", "RepoNotFound")

    def may_write(self, owner):
        if not self.token():
            raise Refuse(401, "Invalid username or password.")
        return self.token() == TOKEN and owner == OWNER

    def writable(self, name):
        allowed = self.may_write(name.split("/")[0])
        if name not in self.hub.models:
            raise Refuse(404, "Repository not found", "RepoNotFound")
        if not allowed:
            raise Refuse(403, "you must use a write token to upload to a repository.")
        return self.hub.models[name]

    # --- reading

    def info(self, kind, name, what, revision, folder, *, query, body):
        repository = self.visible(kind, name)
        if what == "refs":
            refs = {"branches": [], "tags": [], "converts": []}
            for branch in repository.branches:
                ref = {
                    "name": branch,
                    "ref": f"refs/heads/{branch}",
                    "targetCommit": repository.commit(branch),
                }
                refs["tags" if branch in repository.tags else "branches"].append(ref)
            return refs
        files = repository.at(unquote(revision or "main"))
        if what == "tree":
            prefix = f"{unquote(folder)}/" if folder else ""
            recursive = parse_qs(query).get("recursive", ["false"])[0].lower() == "true"
            if entries := _entries(files, prefix, recursive=recursive):
                return entries
            raise Refuse(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return [entry for entry in _entries(files, "", recursive=True) if entry["path"] in wanted]
        return {
            "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
            "id": name,
            "sha": commit_of(files),
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path, "size": len(content)} for path, content in files.items()],
        }

    def file(self, dataset, name, revision, path, *, query, body):
        repository = self.visible("datasets" if dataset else "models", name)
        if repository.gated and self.token() != TOKEN:
            raise Refuse(401, f"Access to {name} is restricted", "GatedRepo")
        files, path = repository.at(unquote(revision)), unquote(path)
        headers = {"X-Repo-Commit": commit_of(files)}
        if path not in files:
            raise Refuse(404, "Entry not found", "EntryNotFound", headers)
        content = files[path]
        headers |= {"ETag": f'"{blob(content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return 206, content[start : end + 1], headers

    # --- uploading

    def validate(self, *, query, body):
        content = json.loads(body)["content"]
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
        except yaml.YAMLError as error:
            return 400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode()
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    def create(self, *, query, body):
        asked = json.loads(body)
        name, owner = f"{asked['organization']}/{asked['name']}", asked["organization"]
        url = f"{self.hub.endpoint}/{name}"
        if not self.may_write(owner):
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise Refuse(403, message)
        if name in self.hub.models:
            return 409, json.dumps({"error": "You already created this model repo", "url": url}).encode()
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add_model(name, private=private)
        return {"url": url, "name": name}

    def lfs(self, name, what, *, query, body):
        asked, arrived = json.loads(body), self.writable(name).objects
        if what == "verify":
            if len(arrived.get(asked["oid"], b"")) != asked["size"]:
                raise Refuse(422, "the object has not arrived")
            return {}
        objects = []
        for oid, size in ((wanted["oid"], wanted["size"]) for wanted in asked["objects"]):
            upload = {"href": f"{self.hub.endpoint}/storage/{name}/{oid}?{SIGNATURE}"}
            verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify"}
            actions = {} if oid in arrived else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size, **actions})
        return {"transfer": "basic", "objects": objects}

    def store(self, name, oid, *, query, body):
        assert query == SIGNATURE
        assert "Authorization" not in self.headers, "the token goes to the hub alone"
        if len(body) == int(self.headers["Content-Length"]):  # otherwise the sender is gone
            if hashlib.sha256(body).hexdigest() != oid:
                raise Refuse(400, "BadDigest")
            self.hub.models[name].objects[oid] = body
            self.hub.received.append(oid)
        return 200, b""

    def change(self, name, what, revision, *, query, body):
        repository, revision = self.writable(name), unquote(revision)
        if what == "branch":
            repository.branches[revision] = dict(repository.branches["main"])
            return {}
        if revision not in repository.branches:
            raise Refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repository.branches[revision])
        if what == "preupload":
            return {"files": [_mode(file, files) for file in json.loads(body)["files"]]}
        header, *operations = map(json.loads, body.splitlines())
        if header["value"].get("parentCommit") not in (None, repository.commit(revision)):
            raise Refuse(412, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "deletedFile":
                del files[path]
            elif operation["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif value["oid"] in repository.objects:
                files[path] = repository.objects[value["oid"]]
            else:
                raise Refuse(400, f"{path} has not been uploaded")
        repository.branches[revision] = files
        repository.summaries.append(header["value"]["summary"])
        commit = commit_of(files)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}


_ROUTES = (
    ("/api/validate-yaml", "validate"),
    ("/api/repos/create", "create"),
    (r"/NAME\.git/info/lfs/(objects/batch|verify)", "lfs"),
    ("/api/models/NAME/(preupload|commit|branch)/([^/]+)", "change"),
    ("/storage/NAME/([0-9a-f]{64})", "store"),
    ("/api/(datasets|models)/NAME(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?", "info"),
    ("/(datasets/)?NAME/resolve/([^/]+)/(.+)", "file"),
)


def _entries(files, prefix, *, recursive):
    """List what lies below a folder, as the hub's tree does."""
    entries = {}
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
            if _is_large(path, len(content)):
                pointer = {"oid": _object_id(path, content), "size": len(content), "pointerSize": 134}
                entries[path] |= {"oid": "0" * 40, "lfs": pointer}
    return list(entries.values())


def _mode(file, files):
    path = file["path"]
    known = {"oid": _object_id(path, files[path])} if path in files else {}
    mode = "lfs" if _is_large(path, int(file["size"])) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}


def _is_large(path, size):
    """Whether a file is kept outside of git, as the hub's .gitattributes say."""
    return path.endswith(".safetensors") or size >= LARGE_BYTES


def _object_id(path, content):
    """Return what the hub names a file's content by: sha256 of large files, git's hash of the others."""
    return hashlib.sha256(content).hexdigest() if _is_large(path, len(content)) else blob(content)


def commit_of(files):
    hashes = sorted((path, blob(content)) for path, content in files.items())
    return hashlib.sha1(json.dumps(hashes).encode()).hexdigest()


@functools.cache  # asked for with every request
def blob(content):
    """Hash as git does: the hub's ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def after_puts(count, action):
    """Return a hook that acts on every large file after the first ``count``."""
    seen, lock = [0], threading.Lock()

    def hook(request):
        if request.startswith("PUT "):
            with lock:
                seen[0] += 1
                late = seen[0] > count
            if late:
                action(request)

    return hook
