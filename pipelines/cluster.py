"""What a task needs on a Kubernetes cluster: image, resources, volumes, credentials, retries, labels."""

import dataclasses
import re

from kfp import dsl, kubernetes

from components.nodes.train_job import QUEUE_LABEL, VARIABLE, NodeSettings
from core.settings.cluster import ClusterSettings, Toleration, seconds_of
from core.storage.cache import CACHE

SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
"""Keys of the secret that become environment variables of the same name, where the secret has them."""

CONFIG_KEYS = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI")
"""The same of the config map."""

SCRATCH, SHARED = "/scratch", "/cache"

COMPONENT_LABEL, PHASE_LABEL, RECIPE_LABEL = (
    f"adapt-pruner/{name}" for name in ("component", "phase", "recipe")
)
PHASE_OF_NESTED = "{{=split(tasks.name + '-1', '-')[1]}}"
"""Value of a label that Argo replaces by the phase: the nested pipelines of the phases are its tasks phase,
phase-2, phase-3. Of phase-left, phase-left-2, which do whichever phase is left, it makes ``left``. KFP has no
labels that differ between tasks of one definition, and a definition of its own for each task of each phase
doubles the workflow: 20 phases would not fit into what Argo can store. Single quotes, as it stands in JSON
within JSON."""

_CPU_OF_FOLLOWING, _MEMORY_OF_FOLLOWING = "500m", "4Gi"  # of a task that only waits for its nodes
_GROUP = 0  # of the image's home folder
_BACKOFF_FACTOR = 2.0


def configure(
    task: dsl.PipelineTask,
    settings: ClusterSettings,
    *,
    recipe: str,
    gpu: bool,
    phase: int | str = "",
    nodes: int = 1,
) -> dsl.PipelineTask:
    """Give a task all that its pods need, and switch its caching off.

    Args:
        task: A task of one of our components.
        settings: The recipe's ``cluster`` section.
        recipe: The recipe's name.
        gpu: Whether the task computes on accelerators.
        phase: The phase, 0 for the dense model, or ``PHASE_OF_NESTED``; "" for a task that runs once.
        nodes: How many the task has compute for it, with the resources that its pod would have.

    Returns:
        The same task.
    """
    component = task.component_spec.name
    gpus = settings.gpus_of(component, gpu_task=gpu)
    settings = settings.of(component)
    if nodes > 1:
        told = NodeSettings(runtime=settings.training_runtime, resources=resources_of(settings, gpus))
        task.set_env_variable(VARIABLE, told.to_text())
        follows = dataclasses.replace(settings, cpu=_CPU_OF_FOLLOWING, memory=_MEMORY_OF_FOLLOWING)
        _set_resources(task, follows, 0)
    else:
        _set_resources(task, settings, gpus)
    _set_nodes(task, settings, gpu=gpus > 0)
    _set_volumes(task, settings)
    _set_environment(task, settings)
    _set_attempts(task, settings)
    _set_identity(task, settings)
    _set_labels(task, {COMPONENT_LABEL: component, PHASE_LABEL: str(phase), RECIPE_LABEL: label_of(recipe)})
    # A cached output would name a checkpoint that nobody has looked for. Steps find their own publications.
    return task.set_container_image(settings.image).set_caching_options(False)


def label_of(name: str) -> str:
    """Return a name as the value of a label: at most 63 letters, digits, hyphens, underscores and dots."""
    return re.sub("[^A-Za-z0-9._-]+", "-", name).strip("-_.")[:63].strip("-_.")


def _set_labels(task: dsl.PipelineTask, labels: dict[str, str]) -> None:
    """Label the pods, which are all called alike, so that ``kubectl`` finds them."""
    for key, value in labels.items():
        if value:
            kubernetes.add_pod_label(task, key, value)


def resources_of(settings: ClusterSettings, gpus: int) -> dict[str, dict[str, str]]:
    """Return the resources of a container, as ``_set_resources`` gives them to a task's."""
    accelerators = {settings.gpu_type: str(gpus)} if gpus else {}
    requests = {"cpu": settings.cpu, "memory": settings.memory}
    return {"requests": requests, "limits": {"memory": settings.memory, **accelerators}}


def _set_resources(task: dsl.PipelineTask, settings: ClusterSettings, gpus: int) -> None:
    task.set_cpu_request(settings.cpu)
    task.set_memory_request(settings.memory).set_memory_limit(settings.memory)
    if gpus:
        task.set_accelerator_type(settings.gpu_type).set_accelerator_limit(gpus)


def _set_nodes(task: dsl.PipelineTask, settings: ClusterSettings, *, gpu: bool) -> None:
    """Say which nodes may take the task, and which queue admits it."""
    labels = settings.node_selector | (settings.gpu_node_selector if gpu else {})
    for key, value in labels.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in settings.tolerations + (settings.gpu_tolerations if gpu else ()):
        _tolerate(task, toleration)
    if settings.queue:
        kubernetes.add_pod_label(task, QUEUE_LABEL, settings.queue)


def _tolerate(task: dsl.PipelineTask, toleration: Toleration) -> None:
    kubernetes.add_toleration(
        task,
        key=toleration.key or None,
        operator=toleration.operator,
        value=toleration.value or None,
        effect=toleration.effect or None,
    )


def _set_volumes(task: dsl.PipelineTask, settings: ClusterSettings) -> None:
    if settings.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", "Memory", settings.shared_memory)
    if settings.cache_claim:
        kubernetes.mount_pvc(task, pvc_name=settings.cache_claim, mount_path=SHARED)
        task.set_env_variable(CACHE, SHARED)
    if not settings.scratch:
        return
    if settings.scratch_storage_class:
        kubernetes.add_ephemeral_volume(
            task,
            volume_name="scratch",
            mount_path=SCRATCH,
            access_modes=["ReadWriteOnce"],
            size=settings.scratch,
            storage_class_name=settings.scratch_storage_class,
        )
    else:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH, size_limit=settings.scratch)
    task.set_env_variable("TMPDIR", SCRATCH)
    task.set_env_variable("HF_HOME", f"{SCRATCH}/huggingface")  # what the hub's client downloads


def _set_environment(task: dsl.PipelineTask, settings: ClusterSettings) -> None:
    for name, value in settings.environment.items():
        task.set_env_variable(name, value)
    if settings.secret:
        keys = {key: key for key in SECRET_KEYS}
        kubernetes.use_secret_as_env(task, settings.secret, keys, optional=True)
    if settings.config_map:
        keys = {key: key for key in CONFIG_KEYS}
        kubernetes.use_config_map_as_env(task, settings.config_map, keys, optional=True)


def _set_attempts(task: dsl.PipelineTask, settings: ClusterSettings) -> None:
    if seconds := seconds_of(settings.timeout):
        kubernetes.set_timeout(task, seconds)
    if settings.retries:
        task.set_retry(
            settings.retries,
            backoff_duration=f"{seconds_of(settings.retry_wait)}s",
            backoff_factor=_BACKOFF_FACTOR,
            # Not the longest pause: Argo counts it from the start of the first attempt.
            backoff_max_duration=f"{seconds_of(settings.retry_within)}s",
        )


def _set_identity(task: dsl.PipelineTask, settings: ClusterSettings) -> None:
    """Say who pulls the image, and whom its processes run as."""
    kubernetes.set_image_pull_policy(task, settings.image_pull_policy)
    if settings.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(settings.image_pull_secrets))
    user = {"run_as_user": settings.run_as_user, "run_as_group": _GROUP} if settings.run_as_user else {}
    kubernetes.set_security_context(task, run_as_non_root=True, **user)
