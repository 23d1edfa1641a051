"""A model in MLflow's registry: its versions, each a checkpoint in a store, and their aliases."""

import dataclasses
import random
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import TrackingError
from core.tracking.client import connect, explained, find_or_create, flat
from core.tracking.mlflow import KEY, MAX_PARAM_CHARACTERS, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the version that was registered last, and the one that is in use."""

CHECKPOINT, MEASURED, EVALUATED = "checkpoint_uri", "adapt_pruner.measured", "adapt_pruner.evaluated"
"""Tags of a version: where its checkpoint is, the digest of the settings that it was measured under, and what
was measured by item."""

_MODEL = "adapt_pruner.model"  # the id of its model entry, which SQL servers do not give back
_CLAIM = "adapt_pruner.moving."
_CLAIM_S = 120.0  # after which whoever made a claim has died
_PATIENCE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model."""

    number: str
    checkpoint_uri: str
    """Where its checkpoint is; empty if somebody else has registered it without."""
    run_id: str
    """The MLflow run that it comes from; empty if there is none."""
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Of its model entry: the series of the run's last phase."""


def register(
    tracker: Tracker,
    name: str,
    checkpoint_uri: str,
    *,
    params: Mapping[str, Any],
    phase: int,
    tags: Mapping[str, str] | None = None,
    data_set: tuple[str, str] | None = None,
) -> str:
    """Register the result: an external LoggedModel and a registry version with the alias ``candidate``.

    The weights stay at ``checkpoint_uri``. A checkpoint of this run that is registered keeps its version. The
    model entry gets the parent's figures of the last phase, and the parent's page leads to it.

    Args:
        tracker: Of the run.
        name: Of the registered model.
        checkpoint_uri: The result.
        params: Of the model entry.
        phase: The last phase.
        tags: Of the version.
        data_set: Name and digest of what perplexity was measured on.

    Returns:
        The version, or an empty string when tracking is off.
    """
    if not tracker.uri:
        return ""
    own = {KEY: tracker.key, CHECKPOINT: checkpoint_uri}
    with explained(tracker.uri):
        model = _model_entry(tracker, name, own, params)
        _link_figures(tracker, model, phase, data_set)
        version = _version(tracker, name, {**(tags or {}), **own}, model)
        tracker.client.set_registered_model_alias(name, CANDIDATE, version)
    return version


def _model_entry(
    tracker: Tracker, name: str, tags: dict[str, str], params: Mapping[str, Any]
) -> "LoggedModel":
    client, parent = tracker.client, tracker.client.get_run(tracker.parent_run_id).info
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())

    def find() -> "Sequence[LoggedModel]":
        found = client.search_logged_models([parent.experiment_id], query)
        return sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))

    model = find_or_create(
        find,
        lambda: client.create_logged_model(
            parent.experiment_id,
            name=re.sub(r"[^\w\- ]", "_", name),  # fewer characters than a registered model's name may have
            source_run_id=parent.run_id,
            tags={"mlflow.model.isExternal": "true", **tags},
            params={k: v[:MAX_PARAM_CHARACTERS] for k, v in flat(params)},
            model_type="causal-lm",
        ),
        lambda twin: client.delete_logged_model(twin.model_id),
    )
    if model.status != "READY":
        client.finalize_logged_model(model.model_id, "READY")
    return model


def _link_figures(
    tracker: Tracker, model: "LoggedModel", phase: int, data_set: tuple[str, str] | None
) -> None:
    """Give the model entry the parent's figures of a phase, and make it an output of the parent.

    MLflow logs a model's metric onto a run, too: there it is the very point that the series has already.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    client, parent = tracker.client, tracker.client.get_run(tracker.parent_run_id)

    def linked(point: "Metric") -> "Metric":
        name, digest = data_set if data_set and point.key.startswith("perplexity") else (None, None)
        own = {"model_id": model.model_id, "dataset_name": name, "dataset_digest": digest}
        return Metric(point.key, point.value, point.timestamp, point.step, **own)

    points: dict[str, Metric] = {}
    for name in parent.data.metrics:
        for point in client.get_metric_history(parent.info.run_id, name):
            if point.step == phase:
                points[name] = point  # the last one: it may have been measured again
    there = {metric.key for metric in model.metrics or ()}
    if new := [linked(point) for name, point in points.items() if name not in there]:
        client.log_batch(parent.info.run_id, metrics=new)

    def find() -> "Sequence[LoggedModelOutput]":
        outputs = client.get_run(parent.info.run_id).outputs
        found = outputs.model_outputs if outputs else []
        return [output for output in found if output.model_id == model.model_id][:1]

    output = LoggedModelOutput(model.model_id, step=phase)
    find_or_create(find, lambda: client.log_outputs(parent.info.run_id, [output]), lambda _: None)


def _version(tracker: Tracker, name: str, tags: dict[str, str], model: "LoggedModel") -> str:
    client = tracker.client
    ensure_registered(client, name)
    wanted = {key: tags[key] for key in (KEY, CHECKPOINT)}
    # A server refuses paths of the client's disk as a source; there the model itself is the source.
    local = "://" not in tags[CHECKPOINT] or tags[CHECKPOINT].startswith("file:")
    hidden = local and tracker.uri.startswith(("http:", "https:"))

    def find() -> "Sequence[ModelVersion]":
        found = client.search_model_versions(f"name = '{name}'")
        ours = [version for version in found if wanted.items() <= version.tags.items()]
        return sorted(ours, key=lambda version: int(version.version))

    version = find_or_create(
        find,
        lambda: client.create_model_version(
            name,
            source=f"models:/{model.model_id}" if hidden else tags[CHECKPOINT],
            run_id=None if hidden else tracker.parent_run_id,
            model_id=model.model_id,
            tags={**tags, _MODEL: model.model_id},
        ),
        lambda twin: client.delete_model_version(name, twin.version),
    )
    return str(version.version)


def ensure_registered(client: "MlflowClient", name: str) -> None:
    """Create the registered model if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


class Registry:
    """A registered model."""

    def __init__(self, uri: str, name: str) -> None:
        """Contact nothing yet.

        Args:
            uri: MLflow's address.
            name: Of the registered model.
        """
        self.uri = uri
        self.name = name
        with explained(uri):
            self.client = connect(uri)

    def find(self, which: str) -> Version | None:
        """Return a version by its number or its alias; None if there is none."""
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                found = (
                    self.client.get_model_version(self.name, which)
                    if which.isdecimal()
                    else self.client.get_model_version_by_alias(self.name, which)
                )
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
            return self._version(found)

    def measured_as(self, version: Version, measured: str) -> Version:
        """Return a version with what was measured of its checkpoint under other settings of evaluation.

        Where nothing was, it is returned as it is.
        """
        with explained(self.uri):
            every = self.client.search_model_versions(f"name = '{self.name}'")
            wanted = {CHECKPOINT: version.checkpoint_uri, MEASURED: measured}
            found = [each for each in every if wanted.items() <= each.tags.items()]
            if not found:
                return version
            other = self._version(max(found, key=lambda each: int(each.version)))
            return dataclasses.replace(version, tags=other.tags, metrics=other.metrics)

    def _version(self, found: "ModelVersion") -> Version:
        model_id = found.tags.get(_MODEL) or found.model_id
        model = self.client.get_logged_model(model_id) if model_id else None
        metrics = (model.metrics or []) if model else []
        return Version(
            number=str(found.version),
            checkpoint_uri=found.tags.get(CHECKPOINT) or found.source or "",
            run_id=found.run_id or (model.source_run_id if model else "") or "",
            tags=dict(found.tags),
            # What was measured again stands last.
            metrics={m.key: m.value for m in sorted(metrics, key=lambda metric: metric.timestamp)},
        )

    def move(self, alias: str, version: str, *, expected: str) -> bool:
        """Point an alias at a version, if it still points at ``expected`` ("" for at none).

        Of several processes that move it at once, one after the other gets its turn.

        Returns:
            Whether it points at the version now.
        """
        with explained(self.uri), self._turn():
            current = self.find(alias)
            if (current.number if current else "") != expected:
                return False
            self.client.set_registered_model_alias(self.name, alias, version)
            return True

    def note(self, version: str, description: str, tags: Mapping[str, str]) -> None:
        """Write a version's description (Markdown) and tags."""
        with explained(self.uri):
            for key, value in tags.items():
                self.client.set_model_version_tag(self.name, version, key, value)
            self.client.update_model_version(self.name, version, description)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Store a text as an artifact of a run."""
        with explained(self.uri):
            self.client.log_text(run_id, text, path)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until nobody else moves an alias of this model; MLflow itself knows no such thing.

        Each writes a claim before it looks for those of others, so of two that claim at once at least one
        sees the other. Who sees one steps back, and tries again after a moment of chance.
        """
        claim, deadline = f"{_CLAIM}{uuid.uuid4().hex[:8]}", time.time() + _PATIENCE_S
        try:
            while True:
                self.client.set_registered_model_tag(self.name, claim, f"{time.time():.0f}")
                tags = self.client.get_registered_model(self.name).tags
                others = {
                    key: value for key, value in tags.items() if key.startswith(_CLAIM) and key != claim
                }
                dead = [key for key, value in others.items() if time.time() - _seconds(value) > _CLAIM_S]
                for key in dead:
                    self.client.delete_registered_model_tag(self.name, key)
                if len(dead) == len(others):
                    break
                self.client.delete_registered_model_tag(self.name, claim)
                if time.time() > deadline:
                    raise TrackingError(f"Others are promoting {self.name} in MLflow. Try again later.")
                time.sleep(random.uniform(0.1, 1.0))
            yield
        finally:
            self.client.delete_registered_model_tag(self.name, claim)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
