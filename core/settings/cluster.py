"""The ``cluster`` section of a recipe: how the tasks of a run become pods of a Kubernetes cluster.

It is compiled into the pipeline, ignored by local runs, and not part of the run key.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core.errors import refuse
from core.quantities import in_range, parse_interval

ComponentName = Literal[
    "resolve-base",
    "needs-run",
    "prepare-data",
    "calibrate",
    "score-layers",
    "prune-step",
    "recover-train",
    "evaluate",
    "publish",
    "finalize",
]

_CPU = re.compile(r"(?=.*[1-9])[0-9]+(\.[0-9]+)?m?")
_BYTES = re.compile(r"(?=.*[1-9])[0-9]+([EPTGMK]i|[EPTGM])?")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_THE_SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY", re.IGNORECASE)
_LONGEST_S = 10**8

AUTO = "auto"
UNPLANNED_MEMORY = "32Gi"
"""Of a task of which no plan says what it takes."""


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A taint of nodes that a pod tolerates, as in its ``tolerations``."""

    key: str = ""
    """Key of the taint; empty with the operator Exists matches every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """``Equal``: the taint has ``value``. ``Exists``: it has any value."""
    value: str = ""
    """Value of the taint."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint; empty matches every effect."""

    def __post_init__(self) -> None:
        """Check combinations."""
        problems = []
        if not self.key and self.operator == "Equal":
            problems.append("key is empty, which needs operator=Exists. Name a key, or tolerate every taint.")
        if self.key and not _is_label_key(self.key):
            problems.append(
                f"key={self.key} is not a valid key of a taint. Write one such as nvidia.com/gpu."
            )
        if self.value and self.operator == "Exists":
            problems.append(f"value={self.value} has no effect with operator=Exists. Leave one of them out.")
        if self.value and not _LABEL.fullmatch(self.value):
            problems.append(
                f"value={self.value} is not a valid value of a taint. Take at most 63 letters and digits."
            )
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class ComponentSettings:
    """Settings of the pods of one component; what is left out is as in ``cluster``."""

    gpus: int | None = None
    """Accelerators, also for a component that otherwise requests none."""
    gpu_type: str | None = None
    """Resource name of an accelerator."""
    cpu: str | None = None
    """CPU request."""
    memory: str | None = None
    """Memory request and limit."""
    shared_memory: str | None = None
    """Size of ``/dev/shm``."""
    scratch: str | None = None
    """Size of the volume for temporary files."""
    scratch_storage_class: str | None = None
    """Storage class of that volume."""
    timeout: str | None = None
    """How long an attempt may take."""
    retries: int | None = None
    """Attempts after the first."""
    node_selector: dict[str, str] | None = None
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] | None = None
    """Taints of nodes that pods tolerate."""
    queue: str | None = None
    """The Kueue queue."""

    def __post_init__(self) -> None:
        """Check values."""
        refuse(_pod_problems(self))

    def named(self) -> dict[str, Any]:
        """Return what is not left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How tasks run in pods; ignored by local runs."""

    image: str = "docker.io/library/adapt-pruner-python:0.1.0"
    """The container image of all tasks, digest-pinned in production."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node pulls the image."""
    image_pull_secrets: tuple[str, ...] = ()
    """Kubernetes secrets with the registry's credentials."""
    run_as_user: int = 10001
    """User id of the processes, with group 0, which owns the image's home folder. 0 leaves the choice to the
    cluster, as OpenShift requires; root is refused either way."""
    secret: str = "adapt-pruner"
    """Kubernetes secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN,
    HF_TOKEN, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    config_map: str = "adapt-pruner"
    """Kubernetes config map with AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and MLFLOW_TRACKING_URI."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all tasks, such as HTTPS_PROXY or AWS_CA_BUNDLE; they can be read in the pipeline."""
    gpus: int = 1
    """Accelerators of each GPU task (calibrate, recover-train, evaluate; score-layers where it measures
    again or runs the model to decide, prune-step where it repairs or distills, publish where it measures
    speed). recover-train trains on all of them (``training.ranks``), evaluate shares the benchmarks out
    among them (``evaluation.ranks``), the other tasks use one: ``components.recover-train.gpus`` gives it
    more."""
    gpu_type: str = "nvidia.com/gpu"
    """Resource name of an accelerator."""
    gpu_node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node of a GPU task must have, in addition to ``node_selector``."""
    gpu_tolerations: tuple[Toleration, ...] = ()
    """Tolerations of GPU tasks, in addition to ``tolerations``."""
    cpu: str = "4"
    """CPU request of each task."""
    memory: str = AUTO
    """Memory request and limit of each task. ``auto``: what the plan of memory says of the recipe's base
    model, with room to spare; 32Gi where there is no plan (a base whose config cannot be read when the
    pipeline is compiled, and tasks that hold no model)."""
    shared_memory: str = "1Gi"
    """Size of ``/dev/shm``, a part of ``memory``; empty leaves the container runtime's 64 MB."""
    scratch: str = ""
    """Size of a volume for temporary files (checkpoints while they are read and written, downloads); empty
    puts them on the container's own disk. ``auto``: as the plan says, and empty where there is none."""
    scratch_storage_class: str = ""
    """Storage class of that volume, which group 0 must be able to write; empty takes the node's disk."""
    cache_claim: str = ""
    """PersistentVolumeClaim with files of checkpoints that the tasks of a node share, mounted in all of them:
    what one has fetched from the store the others copy. Group 0 must be able to write it. A tenth of it stays
    free: what was used longest ago makes room. Empty for none."""
    timeout: str = "0"
    """How long an attempt of a task may take (``24h``, ``90min``) before it counts as failed; 0 sets no
    limit."""
    retries: int = 2
    """Attempts after the first. The installation decides what is retried: failures, deleted pods, or both."""
    retry_wait: str = "30s"
    """Pause before the second attempt; it doubles with each further attempt."""
    retry_within: str = "720h"
    """Time for all attempts of a task, from the start of the first: Argo ends what still runs then."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a task's node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of nodes that tasks tolerate."""
    queue: str = ""
    """Kueue's local queue that admits the pods; empty for none."""
    training_runtime: str = "torch-distributed"
    """Kubeflow Trainer's ClusterTrainingRuntime for ``training.nodes``: one for torch, whose job and its
    container are called ``node``, as in Trainer's own manifests."""
    components: dict[ComponentName, ComponentSettings] = field(default_factory=dict)
    """Settings of a component's own, by its name (``recover-train``)."""

    def __post_init__(self) -> None:
        """Check values and combinations."""
        refuse(self._problems())

    def of(self, component: ComponentName) -> "ClusterSettings":
        """Return the settings of one component's pods."""
        own = self.components.get(component, ComponentSettings())
        settings = dataclasses.replace(self, components={}, **own.named())
        memory = UNPLANNED_MEMORY if settings.memory == AUTO else settings.memory
        scratch = "" if settings.scratch == AUTO else settings.scratch
        storage_class = settings.scratch_storage_class if scratch else ""
        return dataclasses.replace(
            settings, memory=memory, scratch=scratch, scratch_storage_class=storage_class
        )

    def gpus_of(self, component: ComponentName, *, gpu_task: bool) -> int:
        """Return how many accelerators a component's pods request."""
        own = self.components.get(component, ComponentSettings()).gpus
        return own if own is not None else self.gpus if gpu_task else 0

    def _problems(self) -> Iterator[str]:
        if not self.image or re.search(r"\s", self.image):
            yield f"image={self.image} is not a valid image. Write it as registry.example/pruner:0.1.0."
        yield from in_range("run_as_user", self.run_as_user, 0, 2**31 - 1)
        for name in ("secret", "config_map", "cache_claim"):
            yield from _wrong_name(name, getattr(self, name), optional=True)
        yield from _wrong_name("training_runtime", self.training_runtime)
        for i, secret in enumerate(self.image_pull_secrets):
            yield from _wrong_name(f"image_pull_secrets[{i}]", secret)
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                yield f"environment.{name} is not a valid variable. Take letters, digits and underscores."
            elif _OF_THE_SECRET.search(name):
                yield f"environment.{name} could be read in the pipeline. Put it into the secret."
        yield from _pod_problems(self)
        yield from _wrong_labels("gpu_node_selector", self.gpu_node_selector)
        for name in ("retry_wait", "retry_within"):
            yield from _wrong_duration(name, getattr(self, name))
            if name == "retry_within" and getattr(self, name) == "0":
                yield "retry_within=0 leaves no time for a second attempt. Set retries to 0 instead."
        yield from self._volumes_without_size()

    def _volumes_without_size(self) -> Iterator[str]:
        own = {f"components.{name}.": settings.named() for name, settings in self.components.items()}
        for where, named in {"": {}, **own}.items():
            size = named.get("scratch", self.scratch)
            storage_class = named.get("scratch_storage_class", self.scratch_storage_class)
            concerned = not where or named.keys() & {"scratch", "scratch_storage_class"}
            if storage_class and not size and concerned:
                yield (
                    f"{where}scratch_storage_class={storage_class} needs scratch. Give the volume a size "
                    "there, such as 200Gi, or leave its class empty."
                )


def seconds_of(duration: str) -> int:
    """Return the seconds of a duration such as ``90s``, ``10min`` or ``24h``.

    Raises:
        ValueError: If it is none.
    """
    interval = parse_interval(duration)
    if interval.steps or interval.seconds > _LONGEST_S:
        raise ValueError(f"{duration!r} is not a duration such as 90s, 10min or 24h")
    return round(interval.seconds)


def _pod_problems(settings: ComponentSettings | ClusterSettings) -> Iterator[str]:
    """Yield what is wrong with the settings that a component may have of its own; None is left out."""
    if settings.gpus is not None:
        yield from in_range("gpus", settings.gpus, 0, 64)
    if settings.retries is not None:
        yield from in_range("retries", settings.retries, 0, 20)
    if settings.gpu_type is not None and not _is_label_key(settings.gpu_type):
        yield f"gpu_type={settings.gpu_type} is not a valid resource. Write one such as nvidia.com/gpu."
    if settings.cpu is not None and not _CPU.fullmatch(settings.cpu):
        yield f"cpu={settings.cpu} is not a Kubernetes quantity. Write 4 or 500m."
    if settings.memory not in (None, AUTO) and not _BYTES.fullmatch(str(settings.memory)):
        yield f"memory={settings.memory} is not a Kubernetes quantity. Write 32Gi or 512Mi."
    for name in ("shared_memory", "scratch"):
        value = getattr(settings, name)
        if value == AUTO and name == "scratch":
            continue
        if value and not _BYTES.fullmatch(value):
            yield f"{name}={value} is not a Kubernetes quantity. Write 32Gi or 512Mi, or leave it empty."
    for name in ("scratch_storage_class", "queue"):
        yield from _wrong_name(name, getattr(settings, name) or "", optional=True)
    if settings.timeout is not None:
        yield from _wrong_duration("timeout", settings.timeout)
    yield from _wrong_labels("node_selector", settings.node_selector or {})


def _wrong_name(name: str, value: str, *, optional: bool = False) -> Iterator[str]:
    if not _NAME.fullmatch(value) and not (optional and not value):
        yield (f"{name}={value} is not a valid Kubernetes name. Use a-z, 0-9, hyphens and dots.")


def _wrong_duration(name: str, value: str) -> Iterator[str]:
    try:
        seconds_of(value)
    except ValueError:
        yield f"{name}={value} is not a duration. Write one such as 90s, 10min or 24h, or 0."


def _wrong_labels(name: str, labels: Mapping[str, str]) -> Iterator[str]:
    for key, value in labels.items():
        if not _is_label_key(key) or (value and not _LABEL.fullmatch(value)):
            yield f"{name}.{key}={value} is not a valid node label. Write it as kubectl shows it."


def _is_label_key(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    return _LABEL.fullmatch(name) is not None and (not slash or _NAME.fullmatch(prefix) is not None)
