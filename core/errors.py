"""Every error that a user can cause. It says what, where, the limit, and what to do."""

import re
import tempfile
from collections.abc import Iterable

from core.redaction import one_line

_FULL = re.compile("no space left on device|disk quota exceeded|file too large|disk is full", re.IGNORECASE)


class AdaptPrunerError(Exception):
    """Base of all errors whose text is meant for the user: one ``error:`` line on the command line.

    Names from untrusted files may be part of it: control characters are written out. So may URIs: passwords
    are hidden.
    """

    def __init__(self, *lines: str) -> None:
        """Take the text; several lines for several problems."""
        super().__init__("\n".join(map(one_line, lines)))


class SettingsError(AdaptPrunerError):
    """One or more settings are wrong; all problems are listed at once.

    Attributes:
        problems: One sentence a problem: the full setting name, its value, the limit and what to change.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        """Join ``problems`` into the message."""
        self.problems = tuple(map(one_line, problems))
        super().__init__(*self.problems)


def refuse(problems: Iterable[str]) -> None:
    """Raise a ``SettingsError`` of all problems, if there are any."""
    found = list(problems)
    if found:
        raise SettingsError(found)


class TargetError(AdaptPrunerError):
    """The size that was asked for cannot be reached by removing groups."""


class UnsupportedModelError(AdaptPrunerError):
    """The model belongs to a family whose groups this package does not know."""


class OutOfMemoryError(AdaptPrunerError):
    """A step does not fit into the memory of the device or the host."""


class CheckpointError(AdaptPrunerError):
    """A checkpoint directory is missing, incomplete or not what its config says."""


class ExportError(AdaptPrunerError):
    """A checkpoint cannot be written in the format, or to the place, that was asked for."""


class HubError(AdaptPrunerError):
    """The Hugging Face hub cannot be reached, or refuses what is uploaded."""


class PlanError(AdaptPrunerError):
    """A plan does not fit the checkpoint it is applied to."""


class TrainingError(AdaptPrunerError):
    """A training cannot continue: its loss or its gradients are not finite."""


class LostRankError(TrainingError):
    """A rank has lost its connection to others: most often because one of them has ended."""


class DataError(AdaptPrunerError):
    """A text or task data set cannot be read, or holds too little."""


class StorageError(AdaptPrunerError):
    """The store cannot be reached, read or written."""


class LeaseError(StorageError):
    """Another execution works on the run."""


class InterruptionError(AdaptPrunerError):
    """A signal from outside has ended a step before it was done."""


class FormatError(StorageError):
    """A stored file was written by a newer version, in a format that this one does not know."""


class IntegrityError(StorageError):
    """A stored file is not, byte for byte, what its manifest says."""


class TrackingError(AdaptPrunerError):
    """The MLflow server cannot be reached or refuses what is logged."""


class ClusterError(AdaptPrunerError):
    """Kubeflow Pipelines cannot be reached, refuses what it is asked for, or a run there has failed."""


def full_disk(error: BaseException) -> StorageError | None:
    """Return the message for an error caused by a full disk, whichever library raises it.

    Returns:
        None if it is another error.
    """
    reason = _FULL.search(str(error))
    if reason is None or isinstance(error, AdaptPrunerError):
        return None
    place = getattr(error, "filename", None)
    where = f"{place} cannot be written" if place else "a file cannot be written"
    return StorageError(
        f"{where}: {reason[0].lower()}. Free space there, and in {tempfile.gettempdir()} for what is "
        "temporary, or set TMPDIR to another folder; then rerun to resume."
    )
