"""What a pod finds that is like the pods of a run: asked by ``adapt-pruner doctor``.

The findings are a line of the log, as JSON; those that keep a run from working are the task's error, too.
"""

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

from core.errors import AdaptPrunerError, ClusterError, StorageError
from core.quantities import bytes_text, parse_bytes, seconds_text
from core.storage.cache import CACHE
from core.storage.layout import pointer_of
from core.storage.store import open_store

log = logging.getLogger(__name__)

MARK = "findings: "
"""Stands before the JSON in the log."""
CHECKS = ("image", "credentials", "store", "mlflow", "accelerators", "/dev/shm", "scratch", "cache")
"""Names of the checks, in their order."""

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What has come out of a check."""

    check: str
    state: Literal["ok", "note", "fix"]
    """``fix`` is what keeps a run from working, ``note`` what may not be intended."""
    said: str
    """What was found; of what is not ok, also what to do."""


def run_check_pod(*, expected: Mapping[str, Any]) -> None:
    """Check the pod of this process.

    Args:
        expected: What there should be: the image's ``version``; the ``store``; ``tracking_uri``, empty for
            that of the environment; the names ``secret`` and ``config_map``; the number of ``accelerators``
            and ``accelerator_type``; the size of ``shared_memory``, empty for the container runtime's.

    Raises:
        ClusterError: With a line for each thing that keeps a run from working.
    """
    checks = (_image, _credentials, _store, _mlflow, _accelerators, _shared_memory, _scratch, _cache)
    found = [finding for check in checks for finding in check(expected)]
    log.info("%s%s", MARK, json.dumps([asdict(finding) for finding in found]))
    if wrong := [f"{finding.check}: {finding.said}" for finding in found if finding.state == "fix"]:
        raise ClusterError(*wrong)


def _image(expected: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        version = metadata.version("adapt-pruner")
    except metadata.PackageNotFoundError:
        version = "none"
    if version == expected["version"]:
        yield Finding(check="image", state="ok", said=f"was pulled, and holds version {version}")
        return
    yield Finding(
        check="image",
        state="fix",
        said=f"it holds version {version} of adapt-pruner, and this command is {expected['version']}. Build "
        "it from docker/Dockerfile, push it under a new tag, and name that in cluster.image.",
    )


def _credentials(expected: Mapping[str, Any]) -> Iterator[Finding]:
    """Say where the credentials of an S3 store come from."""
    if not expected["store"].startswith("s3://"):
        return
    missing = [key for key in _KEYS if not os.environ.get(key)]
    if not missing:
        yield Finding(check="credentials", state="ok", said="the pod has " + " and ".join(_KEYS))
        return
    import boto3

    found = None if len(missing) < len(_KEYS) else boto3.Session().get_credentials()
    if found is not None:
        yield Finding(check="credentials", state="ok", said=f"the pod gets them by {found.method}")
        return
    secret = f"the secret {expected['secret']}" if expected["secret"] else "cluster.secret, which is empty,"
    yield Finding(
        check="credentials",
        state="fix",
        said=f"the pod lacks {' and '.join(missing)}, and has no cloud role: {secret} is not in its "
        "namespace, or has no such key. Create it there (docker/kubernetes/base/secret.env.example).",
    )


def _store(expected: Mapping[str, Any]) -> Iterator[Finding]:
    uri, started = expected["store"], time.monotonic()
    key, content = pointer_of(f"check-{secrets.token_hex(8)}"), secrets.token_hex(8).encode()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        store = open_store(uri)
        store.write_bytes(key, content, if_absent=True)
        returned = store.read_bytes(key)
        store.delete(key)
        if returned != content:
            raise StorageError(f"{uri} returns other bytes than were written. Check its server.")
    except (AdaptPrunerError, OSError) as error:
        yield Finding(check="store", state="fix", said=_of_config_map(str(error), endpoint, expected))
        return
    took = seconds_text(time.monotonic() - started)
    yield Finding(check="store", state="ok", said=f"{uri} was written, read and cleaned up in {took}")


def _of_config_map(problem: str, endpoint: str, expected: Mapping[str, Any]) -> str:
    if endpoint or not expected["store"].startswith("s3://"):
        return problem
    name = expected["config_map"] or "that cluster.config_map names"
    return f"{problem} The pod has no AWS_ENDPOINT_URL, which means AWS itself: see the config map {name}."


def _mlflow(expected: Mapping[str, Any]) -> Iterator[Finding]:
    uri = expected["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        yield Finding(
            check="mlflow",
            state="note",
            said="nothing will be tracked: tracking.uri is empty, and the pod has no MLFLOW_TRACKING_URI. "
            "Set one of them if it should be.",
        )
        return
    from core.tracking.client import connect, explained

    try:
        with explained(uri):
            connect(uri).search_experiments(max_results=1)
    except AdaptPrunerError as error:
        yield Finding(check="mlflow", state="fix", said=str(error))
        return
    yield Finding(check="mlflow", state="ok", said=f"{uri} answers")


def _accelerators(expected: Mapping[str, Any]) -> Iterator[Finding]:
    wanted, kind = int(expected["accelerators"]), expected["accelerator_type"]
    if not wanted:
        return
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if len(names) >= wanted:
        said = f"{wanted} of {kind}: {', '.join(dict.fromkeys(names))}"
        yield Finding(check="accelerators", state="ok", said=said)
        return
    advice = (
        "a process sees one MIG device, so set gpus to 1"
        if "/mig-" in kind and names
        else f"check the node's driver (PyTorch is for CUDA {torch.version.cuda}), that its "
        "container runtime is NVIDIA's, and that the image was not built with VARIANT=cpu"
    )
    yield Finding(
        check="accelerators",
        state="fix",
        said=f"the pod was given {wanted} of {kind}, and PyTorch sees {len(names)}: {advice}.",
    )


def _shared_memory(expected: Mapping[str, Any]) -> Iterator[Finding]:
    if not expected["shared_memory"]:
        return
    volume = os.statvfs(_SHARED_MEMORY)
    size, wanted = volume.f_frsize * volume.f_blocks, parse_bytes(expected["shared_memory"])
    if size >= wanted:
        yield Finding(check="/dev/shm", state="ok", said=f"has {bytes_text(size)}")
        return
    yield Finding(
        check="/dev/shm",
        state="fix",
        said=f"has {bytes_text(size)} of the {bytes_text(wanted)} of cluster.shared_memory. Raise "
        "cluster.memory, which it is a part of, or lower cluster.shared_memory.",
    )


def _scratch(expected: Mapping[str, Any]) -> Iterator[Finding]:
    folder, cache = Path(os.environ.get("TMPDIR") or "/tmp"), os.environ.get("HF_HOME", "")
    if problem := _why_not_writable(folder):
        yield Finding(
            check="scratch",
            state="fix",
            said=f"{folder} cannot be written ({problem}). A volume of cluster.scratch_storage_class "
            "must be writable for group 0, by the fsGroup of the pod: see Scratch in docs/operating.md. Or "
            "leave the class empty.",
        )
    elif problem := _why_not_writable(Path(cache)) if cache else "":
        yield Finding(
            check="scratch",
            state="fix",
            said=f"{cache}, the HF_HOME of the image, cannot be written ({problem}). If a "
            f"Dockerfile of yours adds to this image, have it remove {Path(cache).parent} at its end.",
        )
    else:
        free = bytes_text(disk_usage(folder).free)
        yield Finding(check="scratch", state="ok", said=f"{folder} has {free} free")


def _cache(expected: Mapping[str, Any]) -> Iterator[Finding]:
    """Look at what tasks share; a run goes on without, so nothing keeps it from working."""
    folder = os.environ.get(CACHE, "")
    if not folder:
        return
    if problem := _why_not_writable(Path(folder)):
        said = f"{folder} cannot be written ({problem}), so that each task fetches from the store. "
        said += "The claim that cluster.cache_claim names must be writable for group 0."
        yield Finding(check="cache", state="note", said=said)
    else:
        free = bytes_text(disk_usage(folder).free)
        yield Finding(check="cache", state="ok", said=f"{folder} has {free} free")


def _why_not_writable(folder: Path) -> str:
    """Return the reason, empty if files can be made in a folder; one that is not there yet is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
