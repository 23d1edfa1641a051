"""The half of the stand-in for the Hugging Face hub that takes uploads.

Large files go to a storage of their own under signed addresses (git-lfs, basic transfer), small ones inside
the commit. As on the hub, a commit names its parent, and refuses large files that have not arrived.
"""

import base64
import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from urllib.parse import unquote

import yaml

TOKEN = "hf_stand_in"
"""Opens private repositories, and may write to those of ``OWNER``."""
READ_TOKEN = "hf_reads_only"
OWNER = "team"
SIGNATURE = "X-Amz-Signature=5ecret"
LARGE_BYTES = 10_000_000

_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)")
_STORAGE = re.compile(r"/storage/([^/]+/[^/]+)/([0-9a-f]{64})")


class Refuse(Exception):
    """Raised by ``Hub.hook``: the request is answered with this status."""

    def __init__(self, status, message, code=""):
        super().__init__(message)
        self.status, self.code = status, code


class Cut(Exception):
    """Raised by ``Hub.hook``: the connection breaks, in the middle of what is sent."""


class Lost(Exception):
    """Raised by ``Hub.hook``: the request is done, but its answer does not arrive."""


def is_large(path: str, content: bytes) -> bool:
    """Whether a file is kept outside of git, as the hub's .gitattributes say."""
    return path.endswith(".safetensors") or len(content) >= LARGE_BYTES


class Uploads:
    """Part of the request handler; ``served``, ``_refuse``, ``_send_json`` and ``_send`` are the other's."""

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        path, _, query = self.path.partition("?")
        self.served.requests.append(f"PUT {path}")
        try:
            self.served.hook(f"PUT {path}")
        except Cut:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        except Refuse as refusal:
            self.rfile.read(length)
            self._refuse(refusal.status, refusal.code, str(refusal))
            return
        body = self.rfile.read(length)
        match = _STORAGE.fullmatch(path)
        assert match, self.path
        assert query == SIGNATURE
        assert "Authorization" not in self.headers, "the token goes to the hub alone"
        if len(body) < length:  # the sender is gone
            return
        if hashlib.sha256(body).hexdigest() != match[2]:
            self._refuse(400, "", "BadDigest")
            return
        self.served.models[match[1]].objects[match[2]] = body
        self.served.received.append(match[2])
        self._send(200)

    def write(self, path: str, body: bytes) -> bool:
        """Answer a request that has to do with an upload; False if this is none."""
        batch, commit = _BATCH.fullmatch(path), _COMMIT.fullmatch(path)
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif batch and self._writable(batch[1]):
            (self._verify if batch[2] == "verify" else self._batch)(batch[1], json.loads(body))
        elif commit and self._writable(commit[1]):
            name, what, revision = commit[1], commit[2], unquote(commit[3])
            repository = self.served.models[name]
            if what == "branch":
                repository.branches[revision] = dict(repository.branches["main"])
                self._send_json({})
            elif revision not in repository.branches:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            elif what == "preupload":
                self._preupload(repository.branches[revision], json.loads(body)["files"])
            else:
                self._commit(name, revision, [json.loads(line) for line in body.splitlines()])
        else:
            return bool(batch or commit)
        return True

    def _validate(self, content: str) -> None:
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
        except yaml.YAMLError as error:
            self._send(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode())
            return
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        self._send_json({"errors": [], "warnings": warnings})

    def _known(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given in (TOKEN, READ_TOKEN):
            return True
        message = "Invalid credentials in Authorization header" if given else "Invalid username or password."
        self._refuse(401, "", message)
        return False

    def _may_write(self, owner: str) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" and owner == OWNER

    def _writable(self, name: str) -> bool:
        if not self._known():
            return False
        if self.served.models.get(name) is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return False
        if not self._may_write(name.split("/")[0]):
            message = "you must use a write token to upload to a repository."
            self._refuse(403, "", message)
            return False
        return True

    def _create(self, asked: Mapping[str, object]) -> None:
        if not self._known():
            return
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(str(asked["organization"])):
            message = (
                f'You don\'t have the rights to create a model under the namespace "{asked["organization"]}"'
            )
            self._refuse(403, "", message)
        elif name in self.served.models:
            url = {"error": "You already created this model repo", "url": f"{self.served.endpoint}/{name}"}
            self._send(409, json.dumps(url).encode())
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.served.add_model(name, private=private)
            self._send_json({"url": f"{self.served.endpoint}/{name}", "name": name})

    def _preupload(self, files: Mapping[str, bytes], asked: list[Mapping[str, object]]) -> None:
        answers = []
        for file in asked:
            path, size = str(file["path"]), int(file["size"])
            large = is_large(path, b"") or size >= LARGE_BYTES
            known = {"oid": object_id(path, files[path])} if path in files else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._send_json({"files": answers})

    def _batch(self, name: str, asked: Mapping[str, object]) -> None:
        actions = {
            "upload": {"href": f"{self.served.endpoint}/storage/{name}/OID?{SIGNATURE}"},
            "verify": {"href": f"{self.served.endpoint}/{name}.git/info/lfs/verify"},
        }
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.served.models[name].objects:
                answer["actions"] = json.loads(json.dumps(actions).replace("OID", wanted["oid"]))
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def _verify(self, name: str, asked: Mapping[str, object]) -> None:
        arrived = self.served.models[name].objects.get(asked["oid"], b"")
        if len(arrived) == asked["size"]:
            self._send_json({})
        else:
            self._refuse(422, "", "the object has not arrived")

    def _commit(self, name: str, revision: str, lines: list[dict[str, dict]]) -> None:
        repository = self.served.models[name]
        (header, *operations) = lines
        files = dict(repository.branches[revision])
        if header["value"].get("parentCommit") not in (None, repository.commit(revision)):
            message = "A commit has happened since. Please refresh and try again."
            self._refuse(412, "", message)
            return
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
                self._refuse(400, "", f"{path} has not been uploaded")
                return
        repository.branches[revision] = files
        repository.summaries.append(header["value"]["summary"])
        commit = repository.commit(revision)
        url = f"{self.served.endpoint}/{name}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def object_id(path: str, content: bytes) -> str:
    """Return what the hub names a file's content by: sha256 of large files, git's hash of the others."""
    if is_large(path, content):
        return hashlib.sha256(content).hexdigest()
    return blob(content)


@functools.cache  # asked for with every request
def blob(content: bytes) -> str:
    """Hash as git does: the hub's ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


Hook = Callable[[str], None]


def nothing(request: str) -> None:
    """Let every request pass."""


def after_puts(count: int, action: Hook) -> Hook:
    """Return a hook that acts on every large file after the first ``count``."""
    seen, lock = [0], threading.Lock()

    def hook(request: str) -> None:
        if not request.startswith("PUT "):
            return
        with lock:
            seen[0] += 1
        if seen[0] > count:
            action(request)

    return hook
