"""What a task needs on a Kubernetes cluster: image, resources, credentials, retries.

Local runs ignore all of it but the retries.
"""

from collections.abc import Callable

from kfp import dsl, kubernetes

from core.errors import SettingsError
from core.placement import ClusterSettings

RETRIES = 2
"""Attempts after the first: a task that is tried again goes on from what it has saved."""

_SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
_CONFIG_KEYS = ("AWS_ENDPOINT_URL", "AWS_REGION", "MLFLOW_TRACKING_URI")
_EXAMPLES = {"cpu": "4 or 500m", "memory": "32Gi or 512Mi"}


def configure(
    task: dsl.PipelineTask, settings: ClusterSettings, *, gpu: bool, retries: int
) -> dsl.PipelineTask:
    """Give a task its image, resources, environment and retries, and switch its caching off.

    Args:
        task: A task of one of our components.
        settings: The recipe's ``cluster`` section.
        gpu: Whether the task computes on accelerators.
        retries: Attempts after the first.

    Returns:
        The same task.

    Raises:
        SettingsError: If a resource is not written as Kubernetes writes it.
    """
    _set_resource("cpu", settings.cpu, task.set_cpu_request)
    _set_resource("memory", settings.memory, task.set_memory_request)
    _set_resource("memory", settings.memory, task.set_memory_limit)
    if gpu and settings.gpus:
        task.set_accelerator_type(settings.gpu_type).set_accelerator_limit(settings.gpus)
    if settings.secret:
        keys = {key: key for key in _SECRET_KEYS}
        kubernetes.use_secret_as_env(task, settings.secret, keys, optional=True)
    if settings.config_map:
        keys = {key: key for key in _CONFIG_KEYS}
        kubernetes.use_config_map_as_env(task, settings.config_map, keys, optional=True)
    if retries:
        task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    # A cached output would name a checkpoint that nobody has looked for. Steps find their own publications.
    return task.set_container_image(settings.image).set_caching_options(False)


def _set_resource(name: str, value: str, setter: Callable[[str], object]) -> None:
    try:
        setter(value)
    except ValueError:
        raise SettingsError(
            [f"cluster.{name}={value} is not a Kubernetes quantity. Write {_EXAMPLES[name]}."]
        ) from None
