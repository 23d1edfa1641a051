"""Small publications for tests of the storage, and what happens to them."""

import contextlib
from pathlib import Path

from core.storage.publication import OWN, open_publication
from core.storage.store import open_store
from tests.support.servers import s3_proxy

CONTENT = {
    "config.json": b"{}",
    "model-00001.safetensors": b"weights of layer 0",
    "model-00002.safetensors": b"weights of layer 1" * 1000,
    "tokenizer/vocab.txt": "a\nä\n".encode(),
    "empty.txt": b"",
}
# printf 'weights of layer 0' | sha256sum
LAYER_0_SHA256 = "3578502597837c0d15e37970395cadc5135ccd38a8bc1e63590e942ce0e5c7f1"
RIVAL = CONTENT | {"model-00001.safetensors": b"WEIGHTS OF LAYER 0", "model-00002.safetensors": b"others"}


def write(directory: Path, content: dict[str, bytes]) -> Path:
    for path, data in content.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def read(directory: Path) -> dict[str, bytes]:
    """All files, less the two that the storage itself keeps beside them."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    content = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return {path: data for path, data in content.items() if path not in OWN}


def fetch(uri: str, directory: Path) -> Path:
    """For another process, which an opened publication cannot be sent to."""
    return open_publication(uri).fetch(directory)


@contextlib.contextmanager
def behind(s3_server, spoil, monkeypatch, attempts=8):
    """Let all that the block asks of the S3 server pass by ``spoil``."""
    with s3_proxy(s3_server, spoil) as proxy, monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        environment.setenv("AWS_MAX_ATTEMPTS", str(attempts))
        yield


def die_before_the_manifest(uri: str) -> None:
    """Bring ``uri`` to the state that a publisher leaves who dies at the last moment."""
    open_store(uri).delete("MANIFEST.json")


def backend(uri: str) -> str:
    return " (s3)" if uri.startswith("s3:") else " (folder)"
