"""Where things stand in a store; what this module does not know is not ours."""

import re

from core.errors import StorageError
from core.storage.store import check_key

STEPS = {
    "calibrated": "calibrate",
    "scored": "score-layers",
    "pruned": "prune-step",
    "recovered": "recover-train",
    "evaluated": "evaluate",
}
"""Folder of a phase to the step that publishes it, in their order."""

_FOLDER = re.compile(r"((?:runs|bases)/[^/]+)/.+")
_MEASURED = "(?:-[0-9a-f]{8})"  # the settings of what is measured
_PUBLICATION = re.compile(
    rf"(runs/[^/]+/(?:data|final|(?:held-out|report){_MEASURED}"
    rf"|phases/[0-9]{{2,}}/(?:{'|'.join(STEPS)}){_MEASURED}?))/.+"
)
_ALONE = re.compile(r"(jobs|precisions)/[^/]+")


def pointer_of(job: str) -> str:
    """Return the key of the file that tells finalize which run an execution works on."""
    return f"jobs/{job}.json"


def precisions_of(digest: str) -> str:
    """Return the key of the file that tells what ``precision: auto`` has come to for a recipe."""
    return f"precisions/{digest}.json"


def folder_of(key: str) -> str:
    """Return what a key belongs to: ``runs/<key>``, ``bases/<revision>``, ``jobs``, ``precisions`` or ""."""
    try:
        check_key(key)
    except StorageError:
        return ""
    if match := _ALONE.fullmatch(key):
        return match[1]
    match = _FOLDER.fullmatch(key)
    return match[1] if match else ""


def publication_of(key: str) -> str:
    """Return the folder of the run's publication that a key belongs to; "" if it belongs to none."""
    match = _PUBLICATION.fullmatch(key)
    return match[1] if match else ""
