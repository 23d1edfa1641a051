"""Where the checkpoint of a registered model is."""

import re

from core.errors import TrackingError
from core.tracking.client import absolute_uri, explained
from core.tracking.registry import CHECKPOINT, Registry

_MODEL = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))")


def checkpoint_of(model: str, tracking_uri: str) -> str:
    """Return the URI of the checkpoint of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        TrackingError: If there is no such version, it is none of ours, or MLflow cannot be reached.
    """
    match = _MODEL.fullmatch(model)
    if match is None:
        raise TrackingError(f"{model} names no version. Write models:/NAME@ALIAS or models:/NAME/VERSION.")
    if not tracking_uri:
        raise TrackingError(
            f"{model} is in an MLflow registry, and no tracking URI is given. Give --tracking-uri, or set "
            "MLFLOW_TRACKING_URI."
        )
    name, alias, number = match.groups()
    registry = Registry(absolute_uri(tracking_uri), name)
    version = registry.find(alias or number)
    if version is None:
        with explained(registry.uri):
            known = [each.name for each in registry.client.search_registered_models(max_results=20)]
        raise TrackingError(
            f"{model} is not in the registry of MLflow. Models there: {', '.join(known) or 'none'}."
        )
    if not (checkpoint := version.tags.get(CHECKPOINT, "")):
        raise TrackingError(f"{model} was not registered by adapt-pruner: it has no tag {CHECKPOINT}.")
    return checkpoint
