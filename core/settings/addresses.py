"""Addresses of base models: on the hub, in a registry, in a store, and of HEAD files.

Only their syntax; ``core.bases.resolution`` resolves them.
"""

import re
from collections.abc import Iterator

HEAD = "HEAD"
"""Name of the file whose one line names a publication."""

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_REGISTERED = re.compile(r"models:/([^/:@]+)(?:@([\w-]+)|/([1-9][0-9]*))", re.ASCII)
_KINDS = "s3://bucket/prefix, file:///folder, hf://owner/name or models:/name@alias"


def hub_address(base: str) -> tuple[str, str] | None:
    """Return the repository and the revision ("" for the default branch) of ``hf://owner/name[@revision]``."""
    match = _HUB.fullmatch(base)
    return (match[1], match[2] or "") if match else None


def registry_address(base: str) -> tuple[str, str, str] | None:
    """Return name, alias and version, one of the two "", of ``models:/name@alias`` or ``models:/name/3``."""
    match = _REGISTERED.fullmatch(base)
    return (match[1], match[2] or "", match[3] or "") if match else None


def is_head(base: str) -> bool:
    """Return whether ``base`` is the address of a HEAD file."""
    return base.endswith(f"/{HEAD}") and not base.startswith(("hf:", "models:", "package:"))


def base_name(base: str) -> str:
    """Return the repository id of an ``hf://`` address; any other ``base`` as it is."""
    hub = hub_address(base)
    return hub[0] if hub else base


def base_problems(base: str, revision: str) -> Iterator[str]:
    """Yield the problems of the settings ``model.base`` and ``model.revision``."""
    hub = hub_address(base)
    if base.startswith("hf:") and hub is None:
        yield f"base={base} is not a valid hub address. Write hf://owner/name or hf://owner/name@revision."
    elif base.startswith("models:") and registry_address(base) is None:
        yield f"base={base} names no version. Write models:/name@alias or models:/name/3."
    elif "://" in base and not base.startswith(("s3://", "file://", "hf://")):
        yield f"base={_shown(base)} is of an unknown kind. Give {_KINDS}, a folder or a Hugging Face id."
    if hub and hub[1] and revision:
        yield f"base={base} and revision={revision} both name a revision. Leave one out."


def _shown(base: str) -> str:
    return re.sub("//.*@", "//", base)
