"""MLflow: one parent run a pipeline run, and one child run a phase and step.

Without a tracking URI every call does nothing. Importing MLflow takes two seconds, which the first call pays.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.errors import TrackingError
from core.redaction import without_password
from core.settings.storage import TrackingSettings
from core.tracking.client import (
    CurveLog,
    absolute_uri,
    connect,
    experiment_id,
    explained,
    find_or_create,
    flat,
    log_new_points,
)
from core.tracking.presentation import DataSet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
KEY = "adapt_pruner.key"
"""Tag of a parent run, and of what is registered of it."""
STORE = "adapt_pruner.store"
"""Tag of a parent run: where its results go."""
NOTE = "mlflow.note.content"
"""Tag with the description on the page of a run."""
_PHASE, _STEP = "adapt_pruner.phase", "adapt_pruner.step"
_PARENT = "mlflow.parentRunId"
_OURS = "**adapt-pruner** "  # begins a description that no user has written
MAX_PARAM_CHARACTERS = 6000  # MLflow's own limits
_MAX_BATCH_PARAMS = 100
_MAX_RUNS = 1000


def open_tracker(
    settings: TrackingSettings, *, key: str, name: str, tags: Mapping[str, str] | None = None
) -> "Tracker":
    """Return the tracker of the run ``key``; it tracks nothing where no tracking URI is set.

    Args:
        settings: Where to track; an empty ``uri`` takes ``MLFLOW_TRACKING_URI``.
        key: Run key: processes with the same key log onto the same parent run.
        name: What the parent run is called in MLflow.
        tags: Of this run and of its children: who started it.
    """
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return Tracker(absolute_uri(uri), experiment=settings.experiment, key=key, name=name, tags=tags)


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A parent run that MLflow takes for running."""

    run_id: str
    name: str
    run_key: str
    """Key of the run in its store."""
    measured: str
    """Digest of the settings that it is measured under."""
    store: str
    """Where it is stored; empty if an earlier version has started it."""


class ChildRun:
    """The MLflow run of one phase and step; does nothing when tracking is off."""

    def __init__(self, tracker: "Tracker", run_id: str) -> None:
        """Wrap the run ``run_id``; an empty id is a run that is not tracked."""
        self.run_id, self.uri = run_id, tracker.uri
        self._tracker = tracker

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log one value a metric; values that are None are left out."""
        self._log_points((name, step, value) for name, value in metrics.items() if value is not None)

    def log_series(self, name: str, points: Iterable[tuple[int, float]]) -> None:
        """Log a curve as (step, value); a step that is there already stays as it is."""
        if self.run_id:
            with explained(self.uri):
                CurveLog(self._tracker.client, self.run_id).log({name: points})

    def _log_points(self, points: Iterable[tuple[str, int, float]]) -> None:
        if self.run_id:
            with explained(self.uri):
                log_new_points(self._tracker.client, self.run_id, points)


class Tracker:
    """The MLflow runs of one pipeline run, found again by their tags from every process.

    Attributes:
        uri: Tracking URI, with absolute paths; empty when tracking is off.
        key: Run key.
    """

    def __init__(
        self, uri: str, *, experiment: str, key: str, name: str, tags: Mapping[str, str] | None = None
    ) -> None:
        """Contact nothing yet; ``open_tracker`` explains the arguments."""
        self._tags = dict(tags or {})
        self.uri = uri
        self._experiment = experiment
        self.key = key
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

    def start(
        self, params: Mapping[str, Any], tags: Mapping[str, str], data_sets: Iterable[DataSet] = ()
    ) -> None:
        """Find or create the parent run and log those ``params`` (nested names joined by dots) that it lacks.

        Params are immutable in MLflow: a resumed run keeps those of its first start.
        """
        if not self.uri:
            return
        from mlflow.entities import Param, RunTag

        with explained(self.uri):
            run = self._parent_run()
            new = [(k, v[:MAX_PARAM_CHARACTERS]) for k, v in flat(params) if k not in run.data.params]
            items = [Param(k, v) for k, v in new]
            for i in range(0, len(items), _MAX_BATCH_PARAMS):
                self.client.log_batch(run.info.run_id, params=items[i : i + _MAX_BATCH_PARAMS])
            all_tags = {**self._tags, **tags}
            self.client.log_batch(run.info.run_id, tags=[RunTag(k, str(v)) for k, v in all_tags.items()])
            if inputs := [_input_of(data_set) for data_set in data_sets]:
                self.client.log_inputs(run.info.run_id, datasets=inputs)  # knows those that are there
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")

    def describe(self, text: str) -> None:
        """Write the parent's description (Markdown), unless a user has written one."""
        if self.uri:
            with explained(self.uri):
                run = self._parent_run()
                if run.data.tags.get(NOTE, _OURS).startswith(_OURS):
                    self.client.set_tag(run.info.run_id, NOTE, _OURS + without_password(text))

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
            found = self._find_children({_PHASE: str(phase), _STEP: step})
            return bool(found) and found[0].info.status == "FINISHED"

    def logged(self) -> set[tuple[int, str]] | None:
        """Return phase and step of all that ``is_logged`` says True of; None when tracking is off: all."""
        if not self.uri:
            return None
        with explained(self.uri):
            runs = [run for run in self._find_children({}) if run.info.status == "FINISHED"]
            return {
                (int(run.data.tags[_PHASE]), run.data.tags[_STEP]) for run in runs if _STEP in run.data.tags
            }

    @contextmanager
    def child(self, phase: int, step: str) -> Iterator[ChildRun]:
        """Open the run of ``step`` in ``phase``, the same one when the step is retried.

        It ends as FINISHED, or as FAILED (KILLED for Ctrl-C) when the block raises.
        """
        if not self.uri:
            yield ChildRun(self, "")
            return
        with explained(self.uri):
            run_id = self._open_child(f"{phase:02d} {step} · {self._name}", {_PHASE: str(phase), _STEP: step})
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
        """End the parent run, unless it has ended so before, or there is none: a user may have deleted it.

        Children that are open end as KILLED: something killed what was to end them.
        """
        if self.uri:
            with explained(self.uri):
                experiment = self.client.get_experiment_by_name(self._experiment)
                if experiment is None:
                    return
                found = self._parents(experiment.experiment_id, self._given_run())
                for child in self._open_children(found[0]) if found else ():
                    self.client.set_terminated(child.info.run_id, "KILLED")
                if found and found[0].info.status != status:
                    self.client.set_terminated(found[0].info.run_id, status)

    def log_report(self, path: Path) -> None:
        """Store the report as an artifact of the parent run."""
        if self.uri:
            with explained(self.uri):
                self.client.log_artifact(self._parent_run().info.run_id, str(path))

    def log_page(self, text: str, path: str) -> None:
        """Store a page as an artifact of the parent run, which MLflow shows."""
        if self.uri:
            with explained(self.uri):
                self.client.log_text(self._parent_run().info.run_id, text, path)

    def running(self) -> list["OpenRun"]:
        """Return the parent runs of the experiment that MLflow takes for running."""
        with explained(self.uri):
            experiment = experiment_id(self.client, self._experiment, self.uri)
            query = f"attributes.status = 'RUNNING' and tags.`{KEY}` LIKE '%-%'"
            found = self.client.search_runs([experiment], query, max_results=_MAX_RUNS)
        return [
            OpenRun(
                run_id=run.info.run_id,
                name=run.info.run_name or "",
                run_key=run.data.tags[KEY].partition("-")[0],
                measured=run.data.tags[KEY].partition("-")[2],
                store=run.data.tags.get(STORE, ""),
            )
            for run in found
        ]

    def close(self, run: "OpenRun", status: RunStatus, why: str, *, end_s: float) -> None:
        """End a parent run that nobody works on any more, and the children that it had open.

        Args:
            run: The run.
            status: How it ended.
            why: What its description says of it.
            end_s: When it was last heard of, in seconds since 1970 (UTC).
        """
        with explained(self.uri):
            parent = self.client.get_run(run.run_id)
            children = self._open_children(parent)
            note = parent.data.tags.get(NOTE, _OURS)
            said = f"{_OURS}{why}\n\n{note.removeprefix(_OURS)}"
            if not note.startswith(_OURS):
                said = f"{note}\n\n{_OURS}{why}"  # a user's words stay a user's
            self.client.set_tag(run.run_id, NOTE, said)
            for one in (*children, parent):
                how = status if one is parent else "KILLED"
                end_ms = max(int(end_s * 1000), one.info.start_time)
                self.client.set_terminated(one.info.run_id, how, end_time=end_ms)

    def _open_children(self, parent: "Run") -> "list[Run]":
        query = f"attributes.status = 'RUNNING' and tags.`{_PARENT}` = '{parent.info.run_id}'"
        return list(self.client.search_runs([parent.info.experiment_id], query, max_results=_MAX_RUNS))

    def _parent_run(self) -> "Run":
        """Find the parent by its key, else take the run that KFP's MLflow plugin opened, else create one."""
        if self._parent is not None:
            return self._parent
        client = self.client
        experiment = experiment_id(client, self._experiment, self.uri)
        given = self._given_run()

        def take_or_create() -> None:
            if given is not None:
                client.set_tag(given.info.run_id, KEY, self.key)
            else:
                client.create_run(experiment, tags={**self._tags, KEY: self.key}, run_name=self._name)

        self._parent = find_or_create(
            lambda: self._parents(experiment, given),
            take_or_create,
            lambda run: client.delete_run(run.info.run_id),
        )
        return self._parent

    def _parents(self, experiment: str, given: "Run | None") -> "list[Run]":
        """Return the parents that have the key: one, but for the moment in which two are created."""
        places = [experiment] if given is None else [experiment, given.info.experiment_id]
        return _oldest_first(self.client.search_runs(places, f"tags.`{KEY}` = '{self.key}'"))

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
        parent = self._parent_run().info
        if parent.status != "RUNNING":  # it seemed dead while this step waited for a machine
            self.client.update_run(parent.run_id, status="RUNNING")
        created = {**self._tags, **tags, _PARENT: parent.run_id}
        child = find_or_create(
            lambda: self._find_children(tags),
            lambda: self.client.create_run(parent.experiment_id, tags=created, run_name=name),
            lambda run: self.client.delete_run(run.info.run_id),
        )
        if child.info.status != "RUNNING":
            self.client.update_run(child.info.run_id, status="RUNNING")
        return str(child.info.run_id)

    def _find_children(self, tags: dict[str, str]) -> "list[Run]":
        parent = self._parent_run().info
        tags = tags | {_PARENT: parent.run_id}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        return _oldest_first(self.client.search_runs([parent.experiment_id], query))


def _oldest_first(runs: "Iterable[Run]") -> "list[Run]":
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _input_of(data_set: DataSet) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(
        Dataset(data_set.name, data_set.digest, data_set.source_type, data_set.source),
        [InputTag("mlflow.data.context", data_set.context)],
    )
