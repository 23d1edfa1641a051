"""MLflow: one parent run a pipeline run, one child run a phase and step, and the registered result.

Without a tracking URI every call does nothing. Importing MLflow takes two seconds, which the first call pays.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.errors import TrackingError
from core.settings.storage import TrackingSettings
from core.tracking.client import (
    absolute_uri,
    connect,
    experiment_id,
    explained,
    finite,
    flat,
    log_new_points,
    metric_name,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_KEY, _PHASE, _STEP = "adapt_pruner.key", "adapt_pruner.phase", "adapt_pruner.step"
_PARENT = "mlflow.parentRunId"
_MAX_PARAM_CHARACTERS = 6000  # MLflow's own limits
_MAX_BATCH_PARAMS = 100


def open_tracker(settings: TrackingSettings, *, key: str, name: str) -> "Tracker":
    """Return the tracker of the run ``key``; it tracks nothing where no tracking URI is set.

    Args:
        settings: Where to track; an empty ``uri`` takes ``MLFLOW_TRACKING_URI``.
        key: Run key: processes with the same key log onto the same parent run.
        name: What the parent run is called in MLflow.
    """
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return Tracker(absolute_uri(uri), experiment=settings.experiment, key=key, name=name)


class ChildRun:
    """The MLflow run of one phase and step; does nothing when tracking is off."""

    def __init__(self, tracker: "Tracker", run_id: str) -> None:
        """Wrap the run ``run_id``; an empty id is a run that is not tracked."""
        self.run_id = run_id
        self._tracker = tracker

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log one value a metric; values that are None are left out."""
        self._log_points((name, step, value) for name, value in metrics.items() if value is not None)

    def log_series(self, name: str, points: Iterable[tuple[int, float]]) -> None:
        """Log a curve as (step, value); points that are there already change nothing."""
        self._log_points((name, step, value) for step, value in points)

    def _log_points(self, points: Iterable[tuple[str, int, float]]) -> None:
        if self.run_id:
            with explained(self._tracker.uri):
                log_new_points(self._tracker.client, self.run_id, points)


class Tracker:
    """The MLflow runs of one pipeline run, found again by their tags from every process.

    Attributes:
        uri: Tracking URI, with absolute paths; empty when tracking is off.
    """

    def __init__(self, uri: str, *, experiment: str, key: str, name: str) -> None:
        """Contact nothing yet; ``open_tracker`` explains the arguments."""
        self.uri = uri
        self._experiment = experiment
        self._key = key
        self._name = name
        self._client: MlflowClient | None = None
        self._parent: Run | None = None

    @property
    def client(self) -> "MlflowClient":
        """The MLflow client; imports MLflow and checks the URI on first use."""
        if self._client is None:
            with explained(self.uri):
                self._client = connect(self.uri)
        return self._client

    @property
    def parent_run_id(self) -> str:
        """Id of the parent run, which is found or created on first use; empty when tracking is off."""
        if not self.uri:
            return ""
        with explained(self.uri):
            return str(self._parent_run().info.run_id)

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Find or create the parent run and log those ``params`` (nested names joined by dots) that it lacks.

        Params are immutable in MLflow: a resumed run keeps those of its first start.
        """
        if not self.uri:
            return
        from mlflow.entities import Param, RunTag

        with explained(self.uri):
            run = self._parent_run()
            new = [(k, v[:_MAX_PARAM_CHARACTERS]) for k, v in flat(params) if k not in run.data.params]
            items = [Param(k, v) for k, v in new]
            for i in range(0, len(items), _MAX_BATCH_PARAMS):
                self.client.log_batch(run.info.run_id, params=items[i : i + _MAX_BATCH_PARAMS])
            self.client.log_batch(run.info.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")

    def log_phase(self, phase: int, metrics: Mapping[str, float | None]) -> None:
        """Add ``metrics`` to the parent's series at step = ``phase``; logging them again changes nothing."""
        if self.uri:
            with explained(self.uri):
                points = [(name, phase, value) for name, value in metrics.items() if value is not None]
                log_new_points(self.client, self._parent_run().info.run_id, points)

    def is_logged(self, phase: int, step: str) -> bool:
        """Return whether the run of ``step`` in ``phase`` has ended well; True when tracking is off.

        It ends after all is logged: nothing is left to log then.
        """
        if not self.uri:
            return True
        with explained(self.uri):
            found = self._find_child({_PHASE: str(phase), _STEP: step})
            return found is not None and found.info.status == "FINISHED"

    @contextmanager
    def child(self, phase: int, step: str) -> Iterator[ChildRun]:
        """Open the run of ``step`` in ``phase``, the same one when the step is retried.

        It ends as FINISHED, or as FAILED (KILLED for Ctrl-C) when the block raises.
        """
        if not self.uri:
            yield ChildRun(self, "")
            return
        with explained(self.uri):
            run_id = self._open_child(f"{phase:02d} {step}", {_PHASE: str(phase), _STEP: step})
        try:
            yield ChildRun(self, run_id)
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            with suppress(TrackingError), explained(self.uri):  # the block's own error is the one to show
                self.client.set_terminated(run_id, status)
            raise
        with explained(self.uri):
            self.client.set_terminated(run_id, "FINISHED")

    def finish(self, status: RunStatus) -> None:
        """End the parent run."""
        if self.uri:
            with explained(self.uri):
                self.client.set_terminated(self._parent_run().info.run_id, status)

    def log_report(self, path: Path) -> None:
        """Store the report as an artifact of the parent run."""
        if self.uri:
            with explained(self.uri):
                self.client.log_artifact(self._parent_run().info.run_id, str(path))

    def register(
        self, model_name: str, checkpoint_uri: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> str:
        """Register the result: an external LoggedModel and a registry version with the alias ``candidate``.

        The weights stay at ``checkpoint_uri``. A checkpoint of this run that is registered keeps its version.

        Returns:
            The version, or an empty string when tracking is off.
        """
        if not self.uri:
            return ""
        with explained(self.uri):
            version = self._registered_version(model_name, checkpoint_uri)
            if version is None:
                model_id = self._log_model(model_name, checkpoint_uri, params, metrics)
                version = self._new_version(model_name, checkpoint_uri, model_id)
            self.client.set_registered_model_alias(model_name, "candidate", version)
        return version

    def _parent_run(self) -> "Run":
        """Find the parent by its key, else take the run that KFP's MLflow plugin opened, else create one."""
        if self._parent is not None:
            return self._parent
        client = self.client
        experiment = experiment_id(client, self._experiment, self.uri)
        given = self._given_run()
        places = [experiment] if given is None else [experiment, given.info.experiment_id]
        found = client.search_runs(
            places, f"tags.`{_KEY}` = '{self._key}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        if found:
            self._parent = found[0]
        elif given is not None:
            client.set_tag(given.info.run_id, _KEY, self._key)
            self._parent = given
        else:
            self._parent = client.create_run(experiment, tags={_KEY: self._key}, run_name=self._name)
        return self._parent

    def _given_run(self) -> "Run | None":
        """Return the pipeline's run that MLFLOW_RUN_ID (possibly a task's run, nested in it) belongs to."""
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if not run_id:
            return None
        run = self.client.get_run(run_id)
        while _PARENT in run.data.tags:
            run = self.client.get_run(run.data.tags[_PARENT])
        return run

    def _open_child(self, name: str, tags: dict[str, str]) -> str:
        found = self._find_child(tags)
        if found is not None:
            self.client.update_run(found.info.run_id, status="RUNNING")
            return str(found.info.run_id)
        parent = self._parent_run().info
        tags = tags | {_PARENT: parent.run_id}
        return str(self.client.create_run(parent.experiment_id, tags=tags, run_name=name).info.run_id)

    def _find_child(self, tags: dict[str, str]) -> "Run | None":
        parent = self._parent_run().info
        tags = tags | {_PARENT: parent.run_id}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([parent.experiment_id], query, max_results=1)
        return found[0] if found else None

    def _registered_version(self, model_name: str, checkpoint_uri: str) -> str | None:
        wanted = {_KEY: self._key, "checkpoint_uri": checkpoint_uri}
        for version in self.client.search_model_versions(f"name = '{model_name}'"):
            if wanted.items() <= version.tags.items():
                return str(version.version)
        return None

    def _log_model(
        self, model_name: str, checkpoint_uri: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> str:
        parent = self._parent_run().info
        model = self.client.create_logged_model(
            parent.experiment_id,
            name=metric_name(model_name),
            source_run_id=parent.run_id,
            tags={"mlflow.model.isExternal": "true", _KEY: self._key, "checkpoint_uri": checkpoint_uri},
            params={k: v[:_MAX_PARAM_CHARACTERS] for k, v in flat(params)},
            model_type="causal-lm",
        )
        # MLflow logs a model's metric onto a run, too; in the parent's series it would pass for a phase.
        run_id = self._open_child("register", {_STEP: "register"})
        for metric, value in metrics.items():
            self.client.log_metric(
                run_id, metric_name(metric), finite(value), step=0, model_id=model.model_id
            )
        self.client.set_terminated(run_id, "FINISHED")
        self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _new_version(self, name: str, checkpoint_uri: str, model_id: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A server refuses paths of the client's disk as a source; there the model itself is the source.
        local = "://" not in checkpoint_uri or checkpoint_uri.startswith("file:")
        remote = self.uri.startswith(("http:", "https:"))
        version = self.client.create_model_version(
            name,
            source=f"models:/{model_id}" if local and remote else checkpoint_uri,
            run_id=None if local and remote else self._parent_run().info.run_id,
            model_id=model_id,
            tags={_KEY: self._key, "checkpoint_uri": checkpoint_uri},
        )
        return str(version.version)
