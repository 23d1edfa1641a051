"""The layout of a store; files it does not know are not ours."""

import hashlib
import re
import shlex

from core.errors import StorageError
from core.storage.interface import check_key

STEPS = {
    "calibrated": "calibrate",
    "scored": "score-layers",
    "pruned": "prune-step",
    "recovered": "recover-train",
    "evaluated": "evaluate",
}
"""Folder of a phase to the step that publishes it, in their order."""

MOMENTS = "moments"
"""Folder of a phase for the optimizer's state at its end, until the next phase has trained."""

TEACHER = "teacher"
"""Folder of a run for the checkpoint that teaches it, where that is not the base model as it is."""

GENERATED = "generated"
"""Folder of a run for the text that the base model has written for its calibration."""

RESUME = "_resume"
"""Folder in a publication's, until it is published: what lets a task that was killed go on."""

REPORT = "report.json"
"""A step's figures, beside its result."""

ITEMS = "items.json"
"""What evaluate has measured on each item, beside its report."""

TRAINING_STATE = "state.json"
"""How far a training has come, beside its tensors."""

STATISTICS, PLAN = "statistics.safetensors", "plan.json"
"""The results of calibrate and score-layers."""

CALIBRATION_POOL, HELD_OUT = "calibration.safetensors", "perplexity.safetensors"
"""Tokens to draw calibration sets from, and windows for perplexity; prepare-data publishes both."""

RECORD, HTML, CARD = "record.json", "report.html", "README.md"
"""A run's measurements as data, as the report and as the model card."""

REPORT_FORMAT = 1

_FOLDER = re.compile(r"((?:runs|bases)/[^/]+)/.+")
_MEASURED = "(?:-[0-9a-f]{8})"  # the settings of what is measured
_ALONE = re.compile(r"(answers|jobs|precisions|revisions)/[^/]+")
_OF_A_RUN = (
    rf"runs/[^/]+/(?:data|final|{TEACHER}|{GENERATED}|(?:held-out|report){_MEASURED}"
    rf"|phases/[0-9]{{2,}}/(?:{MOMENTS}|(?:{'|'.join(STEPS)}){_MEASURED}?))"
)
_PUBLICATION = re.compile(rf"({_OF_A_RUN})/.+")
_PLACE = re.compile(rf"(.*)/({_OF_A_RUN}|bases/[^/]+)/.+")


def pointer_of(job: str) -> str:
    """Return the key of the file by which finalize finds an execution's run."""
    return f"jobs/{job}.json"


def precisions_of(digest: str) -> str:
    """Return the key of the file that holds the result of ``precision: auto`` for a recipe."""
    return f"precisions/{digest}.json"


def revision_of(digest: str, data_set: str) -> str:
    """Return the key of the file that says which revision of a data set a recipe began with.

    Args:
        digest: Of the recipe.
        data_set: Its id, and the revision that the recipe asks for.
    """
    return f"revisions/{digest}-{hashlib.sha256(data_set.encode()).hexdigest()[:8]}.json"


def answers_at(digest: str) -> str:
    """Return the key of the file that keeps a checkpoint's answers to a benchmark.

    Args:
        digest: Of all that they follow from.
    """
    return f"answers/{digest}.json"


def folder_of(key: str) -> str:
    """Return what a key belongs to: ``runs/<key>``, ``bases/<revision>``, or one of the folders of notes.

    Those are ``answers``, ``jobs``, ``precisions`` and ``revisions``; "" for a key that is not of the layout.
    """
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


def way_back(uri: str) -> str:
    """Return what to do about a damaged file of a publication.

    Args:
        uri: Of the file; it shows whether the publication belongs to a run, and to which.
    """
    place = _PLACE.fullmatch(uri)
    if place is None:
        return (
            "Copy it again from where it came. If it was changed on purpose, remove MANIFEST.json: then the "
            "folder is an ordinary checkpoint."
        )
    store, publication = place.groups()
    damaged = [f"{store}/{publication}"]
    if publication.startswith("runs/") and not publication.endswith("/final"):
        damaged.append(f"{store}/{folder_of(f'{publication}/file')}/DONE.json")
    removed = " and ".join(damaged) if "://" in uri else f"it with `rm -rf {shlex.join(damaged)}`"
    return (
        f"Remove {removed} and run its recipe again (`adapt-pruner run`, or `submit`): what is missing is "
        "computed again."
    )
