"""The current meaning of a base model's address: an alias in MLflow's registry or a HEAD file may move on.

Both are read again whenever a run starts. Others wrote their content: it is checked, and never
followed from one pointer to the next.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from core.errors import CheckpointError, StorageError
from core.redaction import without_password
from core.settings.addresses import HEAD, hub_address, is_head, registry_address
from core.settings.model import ModelSettings
from core.storage.interface import check_key, join_uri, local_errors
from core.storage.publication import MANIFEST
from core.storage.store import open_store
from core.tracking.client import absolute_uri, connect, explained

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_MAX_LINE = 1024
_SHOWN = 80

log = logging.getLogger(__name__)


def current_base(model: ModelSettings, tracking_uri: str = "") -> ModelSettings:
    """Return the settings with an address that may move replaced by what it stands for now.

    Args:
        model: Which model.
        tracking_uri: MLflow's address; empty takes ``MLFLOW_TRACKING_URI``.

    Returns:
        Settings whose base is a folder, a ``.gguf`` file, a publication, or ``hf://owner/name``.

    Raises:
        CheckpointError: If the alias, the version or the HEAD file is not there, or names nothing of use.
        StorageError: If the store of a HEAD file cannot be read.
        TrackingError: If MLflow cannot be reached.
    """
    registered = registry_address(model.base)
    if registered is not None:
        target = _registered(model.base, *registered, tracking_uri)
    elif is_head(model.base) and not _is_local_folder(model.base):
        target = _named_by_head(model.base)
    else:
        target = model.base
    if target != model.base:
        log.info("%s is %s now", model.base, without_password(target))
    hub = hub_address(target)
    if hub is None:
        return dataclasses.replace(model, base=target)
    name, revision = hub
    return dataclasses.replace(model, base=f"hf://{name}", revision=revision or model.revision)


def _registered(base: str, name: str, alias: str, version: str, tracking_uri: str) -> str:
    """Return where the checkpoint of a version in MLflow's registry is."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise CheckpointError(f"model.base={base} needs MLflow. Set tracking.uri or MLFLOW_TRACKING_URI.")
    with explained(uri):
        from mlflow.exceptions import MlflowException

        client = connect(absolute_uri(uri))
        try:
            found: ModelVersion = (
                client.get_model_version_by_alias(name, alias)
                if alias
                else client.get_model_version(name, version)
            )
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise CheckpointError(
                f"model.base={base} is not in MLflow's registry at {without_password(uri)}. Check the name "
                f"and the {'alias' if alias else 'version'} there."
            ) from None
        source = str(found.tags.get("checkpoint_uri") or found.source or "")
        if not _is_checkpoint(source):
            source = str(client.get_model_version_download_uri(name, found.version) or source)
    if not _is_checkpoint(source):
        raise CheckpointError(
            f"model.base={base}: version {found.version} lies at {_quoted(source)}, which is neither a store "
            "nor a folder. Register a version whose source is s3://bucket/prefix or a folder."
        )
    return _in_reach(source)


def _is_checkpoint(source: str) -> bool:
    return source.isprintable() and source.startswith(("s3://", "file:///", "/"))


def _named_by_head(base: str) -> str:
    """Return what the one line of a HEAD file names, relative to the file's folder or absolute."""
    folder, is_local = base.removesuffix(f"/{HEAD}"), not base.startswith("s3://")
    try:
        content = open_store(folder or "/").read_bytes(HEAD)
    except FileNotFoundError:
        raise CheckpointError(
            f"model.base={base}: there is no such file. Write the address of the current checkpoint into it, "
            "in one line."
        ) from None
    line = _only_line(base, content)
    if line.startswith(("s3://", "hf://")):
        target = line
    elif is_local and line.startswith(("file:///", "/")):
        target = _in_reach(line)
    else:
        if ":" in line:
            raise _useless(base, line, "an address that is not followed from there")
        try:
            check_key(line)
        except StorageError:
            raise _useless(base, line, "which leaves its folder") from None
        target = join_uri(folder, line)
        target = _in_reach(target) if is_local else target
    if is_head(target):
        raise _useless(base, line, "another HEAD file")
    if target.startswith("hf://") and hub_address(target) is None:
        raise _useless(base, line, "which is not a valid address on the hub")
    return target


def _only_line(base: str, content: bytes) -> str:
    try:
        line = content[: _MAX_LINE + 1].decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise _useless(base, "bytes", "which are no text") from None
    if len(content) > _MAX_LINE:
        raise _useless(base, line, f"more than {_MAX_LINE} bytes")
    if not line or line != line.strip() or not line.isprintable():
        raise _useless(base, line, "which is not one line of plain text")
    return line


def _useless(base: str, line: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"model.base={base} holds {_quoted(line)}, {problem}. Write one line into it: a path below its "
        "folder, s3://bucket/prefix or hf://owner/name."
    )


def _quoted(text: str) -> str:
    text = without_password(text)
    return ascii(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _in_reach(address: str) -> str:
    """Return a local address as a URI if a publication lies there, else as the path of a folder or file."""
    if address.startswith("s3://"):
        return address
    path = Path(unquote(urlsplit(address).path) if address.startswith("file:") else address)
    with local_errors(path):
        return path.absolute().as_uri() if (path / MANIFEST).is_file() else str(path)


def _is_local_folder(base: str) -> bool:
    return "://" not in base and Path(base).expanduser().is_dir()
