"""Every error that a user can cause, and what it should tell: what, where, the limit, and what to do."""

from collections.abc import Iterable


class AdaptPrunerError(Exception):
    """Base of all errors whose text is meant for the user: one ``error:`` line on the command line."""


class SettingsError(AdaptPrunerError):
    """One or more settings are wrong; all problems are listed at once.

    Attributes:
        problems: One sentence a problem: the full setting name, its value, the limit and what to change.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        """Join ``problems`` into the message."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def refuse(problems: Iterable[str]) -> None:
    """Raise a ``SettingsError`` of all problems, if there are any."""
    found = list(problems)
    if found:
        raise SettingsError(found)


class TargetError(AdaptPrunerError):
    """The size that was asked for cannot be reached by removing groups."""


class UnsupportedModelError(AdaptPrunerError):
    """The model belongs to a family whose groups this package does not know."""


class CheckpointError(AdaptPrunerError):
    """A checkpoint directory is missing, incomplete or not what its config says."""


class ExportError(AdaptPrunerError):
    """A checkpoint cannot be written in the format, or to the place, that was asked for."""


class HubError(AdaptPrunerError):
    """The Hugging Face hub cannot be reached, or refuses what is uploaded."""


class PlanError(AdaptPrunerError):
    """A plan does not fit the checkpoint it is applied to."""


class DataError(AdaptPrunerError):
    """A text or task data set cannot be read, or holds too little."""


class StorageError(AdaptPrunerError):
    """The store cannot be reached, read or written."""


class LeaseError(StorageError):
    """Another execution works on the run."""


class IntegrityError(StorageError):
    """A stored file is not, byte for byte, what its manifest says."""


class TrackingError(AdaptPrunerError):
    """The MLflow server cannot be reached or refuses what is logged."""


class ClusterError(AdaptPrunerError):
    """Kubeflow Pipelines cannot be reached, refuses what it is asked for, or a run there has failed."""
