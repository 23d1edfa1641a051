"""The connection to MLflow: quiet, quick to fail, with one-line errors, and points that are logged once."""

import json
import logging
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import AdaptPrunerError, TrackingError
from core.redaction import without_password
from core.scratch import scratch_folder
from core.tracking.presentation import EXPERIMENT_TAGS

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

_ENVIRONMENT = {
    # MLflow's own defaults wait minutes for a server that is not there: seven retries of up to 120 s each.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_MAX_BATCH = 1000  # metrics a request, MLflow's own limit
_MAX_ERROR_CHARACTERS = 300
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_ATTEMPTS, _PAUSE_S = 3, 1.0


def connect(uri: str) -> "MlflowClient":
    """Import MLflow and return a client for ``uri``; a new sqlite file is created complete.

    Raises:
        TrackingError: If ``uri`` cannot be used.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "://" not in uri or uri.startswith("file:"):
        folder = uri.removeprefix("file://")
        raise TrackingError(
            f"tracking.uri={uri} is a folder, which MLflow no longer supports. "
            f"Use sqlite:///{folder}/mlflow.db or the http:// address of a server."
        )
    from mlflow import MlflowClient

    # MLflow sets its level on import, and not by the environment if somebody else imported it before.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # tracebacks of what is raised anyway
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if (path := sqlite_file(uri)) is not None:
        _ensure_database(path)
    return MlflowClient(tracking_uri=uri)


def absolute_uri(uri: str) -> str:
    """Return ``uri`` with a sqlite file's path made absolute, so that every process means the same file."""
    path = sqlite_file(uri)
    return uri if path is None else uri.replace(_sqlite_path(uri), str(path.absolute()), 1)


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a ``sqlite:///`` URI, None for any other URI."""
    path = _sqlite_path(uri)
    return Path(path) if path and path != ":memory:" else None


def _sqlite_path(uri: str) -> str:
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]*)", uri)
    return match[1] if match else ""


def _ensure_database(path: Path) -> None:
    """Create MLflow's tables in a temporary file, without waiting for the disk, then link it into place.

    On a busy disk that is several times faster than MLflow's migrations on the file itself, and two processes
    that start at once cannot both migrate it.
    """
    if path.exists():
        with sqlite3.connect(path) as connection:  # MLflow would retry for minutes on a file it cannot read
            connection.execute("PRAGMA schema_version")
        connection.close()
        return
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(path.parent) as folder:
        draft = folder / "mlflow.db"
        event.listen(Engine, "connect", _without_waiting)
        try:
            MlflowClient(tracking_uri=f"sqlite:///{draft}").get_experiment("0")
        finally:
            event.remove(Engine, "connect", _without_waiting)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            os.replace(draft, path)


def _without_waiting(connection: sqlite3.Connection, record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")


def experiment_id(client: "MlflowClient", name: str, uri: str) -> str:
    """Return the id of the experiment, which is created, and tagged for its page, where it is missing.

    MLflow would put the artifacts of a sqlite database into ``./mlruns``; they go next to the file instead.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = sqlite_file(uri)
        location = None if path is None else (path.parent / f"{path.stem}-artifacts" / _slug(name)).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
            assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment={name} is deleted in MLflow at {without_password(uri)}. "
            "Restore it there or name another."
        )
    for tag in EXPERIMENT_TAGS.keys() - experiment.tags.keys():
        client.set_experiment_tag(experiment.experiment_id, tag, EXPERIMENT_TAGS[tag])
    return str(experiment.experiment_id)


def find_or_create(
    find: Callable[[], Sequence[T]], create: Callable[[], object], remove: Callable[[T], object]
) -> T:
    """Return the first of what ``find`` finds; where it finds nothing, ``create`` makes it before.

    An answer that is lost on its way does not tell whether the server has created anything. MLflow's client
    would send the request again, and have it twice: this looks before it does. What another process has
    created at the same time is found afterwards; all but the first are removed again.
    """
    failed: Exception | None = None
    for _ in range(_ATTEMPTS):
        if found := find():
            return found[0]
        try:
            with _sending_once():
                create()
        except Exception as error:
            if getattr(error, "get_http_status_code", lambda: 500)() < 500:
                raise
            failed = error
            time.sleep(_PAUSE_S)
            continue
        break
    if not (found := find()):
        raise failed or TrackingError("MLflow does not find what it has just created.")
    for twin in found[1:]:
        remove(twin)
    return found[0]


@contextmanager
def _sending_once() -> Iterator[None]:
    """Let MLflow's client send each request of the block once."""
    before = os.environ.get(_RETRIES)
    os.environ[_RETRIES] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_RETRIES]
        else:
            os.environ[_RETRIES] = before


class CurveLog:
    """Logs curves that grow onto a run, each step once.

    A step that the run has already stays as it is: a training that resumes takes the steps since its last
    state again, with other times.
    """

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        """Contact nothing yet."""
        self._client, self._run_id = client, run_id
        self._names: set[str] | None = None
        self._steps: dict[str, set[int]] = {}

    def log(self, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
        """Log those (step, value) points of each curve whose step the run does not have."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = []
        for name, points in curves.items():
            name = metric_name(name)
            there = self._logged(name)
            new += [Metric(name, finite(value), now, step) for step, value in points if step not in there]
        for i in range(0, len(new), _MAX_BATCH):
            self._client.log_batch(self._run_id, metrics=new[i : i + _MAX_BATCH])
            for metric in new[i : i + _MAX_BATCH]:
                self._steps[metric.key].add(metric.step)

    def _logged(self, name: str) -> set[int]:
        if self._names is None:
            self._names = set(self._client.get_run(self._run_id).data.metrics)
        if name not in self._steps:
            known = self._client.get_metric_history(self._run_id, name) if name in self._names else ()
            self._steps[name] = {point.step for point in known}
        return self._steps[name]


def log_new_points(client: "MlflowClient", run_id: str, points: Iterable[tuple[str, int, float]]) -> None:
    """Log the (metric, step, value) points that the run does not have yet; MLflow would append them again."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    wanted = [Metric(metric_name(name), finite(value), now, step) for name, step, value in points]
    known = client.get_run(run_id).data.metrics
    there = {
        (point.key, point.step, repr(point.value))  # repr: a NaN differs from itself
        for name in {point.key for point in wanted} & known.keys()
        for point in client.get_metric_history(run_id, name)
    }
    new = [point for point in wanted if (point.key, point.step, repr(point.value)) not in there]
    for i in range(0, len(new), _MAX_BATCH):
        client.log_batch(run_id, metrics=new[i : i + _MAX_BATCH])


def finite(value: float) -> float:
    """Return ``value`` as MLflow's databases keep it: infinities become the largest float."""
    number = float(value)  # an int would not be found again among the floats that come back
    return number if math.isnan(number) else max(-sys.float_info.max, min(sys.float_info.max, number))


def metric_name(name: str) -> str:
    """Replace what MLflow forbids in the names of metrics and params."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested mappings to (dotted name, text); lists become JSON."""
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield metric_name(name), without_password(text)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn whatever MLflow and its many stores raise inside the block into a one-line TrackingError."""
    connections = logging.getLogger("urllib3.connectionpool")
    level = connections.level
    connections.setLevel(logging.ERROR)  # a warning for every retry
    try:
        yield
    except AdaptPrunerError:
        raise
    except Exception as error:
        raise TrackingError(_explain(error, without_password(uri))) from error
    finally:
        connections.setLevel(level)


def _explain(error: Exception, uri: str) -> str:
    text = without_password(" ".join(str(error).split()))
    if found := re.search(r"too many (\d+) error responses", text):
        return (
            f"MLflow at {uri} answers with HTTP {found[1]}. Its log says why; start the run again once that "
            "is mended, or leave tracking.uri and MLFLOW_TRACKING_URI empty to run without tracking."
        )
    if re.search("Max retries exceeded|Connection refused|ConnectTimeout|timed out|could not connect", text):
        return (
            f"MLflow at {uri} cannot be reached. Start the server, correct tracking.uri or "
            "MLFLOW_TRACKING_URI, or leave both empty to run without tracking."
        )
    if re.search(r"error code:? 40[13]|UNAUTHENTICATED|PERMISSION_DENIED", text):
        return (
            f"MLflow at {uri} refuses access. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN."
        )
    if "out-of-date database schema" in text:
        return f"The database {uri} was made by another MLflow version. Run: mlflow db upgrade {uri}"
    if isinstance(error, sqlite3.Error | OSError) and sqlite_file(uri) is not None:
        return f"The MLflow database {uri} cannot be used ({text}). Give tracking.uri a writable sqlite file."
    return f"MLflow at {uri} failed: {text[:_MAX_ERROR_CHARACTERS]}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w\-.]", "_", name)
