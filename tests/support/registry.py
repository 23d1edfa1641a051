"""Versions of a registered model, as runs register them."""

from core.settings.storage import TrackingSettings
from core.tracking.mlflow import open_tracker
from core.tracking.registry import MEASURED, register


def candidate(uri, name, key, *, checkpoint="", measured="m", tags=None, **figures):
    """Register a run's result as a run does; return its tracker and its version."""
    tracker = open_tracker(TrackingSettings(uri=uri, experiment="test"), key=key, name="a run")
    tracker.log_phase(2, figures)
    where = f"s3://models/runs/{checkpoint or key}/final"
    texts = ("c4", "0a1b")
    tags = {MEASURED: measured, **(tags or {})}
    return tracker, register(tracker, name, where, params={"base": "b"}, phase=2, tags=tags, data_set=texts)
