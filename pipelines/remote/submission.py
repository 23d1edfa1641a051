"""Submitting: the compiled pipeline becomes a version on Kubeflow Pipelines, and a run of it.

A version is named after the digest of its content: one that exists already is not uploaded again. kfp's
client uploads and starts, but finds nothing beyond the first page of a list, and fails where somebody else
creates the same at the same time. Every function that asks the cluster raises a ``ClusterError`` if it cannot
be reached or refuses.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import kfp_server_api

from core.errors import refuse
from core.evaluation.task_data import unknown_tasks
from core.scratch import scratch_folder
from core.settings.cluster import AUTO, ComponentName
from core.settings.includes import NOT_YAML, load_yaml
from core.settings.parameters import (
    PARAMETERS,
    compiled_settings,
    parameters_of,
    scores_on_accelerator,
    settings_of_run,
)
from core.settings.schema import Settings
from pipelines.adapt_accel import compile_pipeline
from pipelines.ir import Document, read_ir
from pipelines.remote.client import Client, named, pages

if TYPE_CHECKING:
    from core.steps.footprint import Footprint

PIPELINE = "adapt-pruner"
"""Name of the pipeline on the cluster; each recipe and number of phases is a version of it."""

Needs = Mapping[ComponentName, "Footprint"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A compiled pipeline."""

    content: bytes  # YAML
    version: str
    """Name of the version: the recipe's name and the digest of ``content``."""
    tasks: Mapping[str, str]
    """Task in the IR to its name for people; ``{}`` stands for the phase of what each phase does."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a run is started, or scheduled, with."""

    settings: Settings  # with the overrides of ``arguments``
    package: Package
    arguments: Mapping[str, Any]
    """Pipeline parameters: those that lists and comparisons of runs show, and any that is overridden."""
    service_account: str | None  # Kubernetes service account of the pods; None for that of the installation
    needs: Needs = field(default_factory=dict)  # what tasks are estimated to take; empty if not known


def prepare(settings: Settings, overrides: Iterable[str] = (), *, service_account: str = "") -> Submission:
    """Compile the pipeline, and check everything that can be checked without the cluster.

    Raises:
        SettingsError: If a parameter is unknown, of the wrong type or out of range, or a setting names a
            place of this machine, or a task that lm-eval does not have.
    """
    arguments, as_written = _arguments(overrides), settings
    if "recipe" in arguments:
        arguments["recipe"] = {"name": settings.name} | arguments["recipe"]
    if arguments:
        compiled = compiled_settings(settings, phases=settings.prune.phases)
        overridden = settings_of_run(parameters_of(settings) | arguments, compiled)
        settings = replace(overridden, cluster=settings.cluster)
    if scores_on_accelerator(settings.prune) != scores_on_accelerator(as_written.prune):
        as_written = settings  # other tasks get accelerators: a version of its own
    refuse([*out_of_reach(settings), *unknown_tasks(settings.evaluation)])
    settings, needs = planned(settings)
    package = compile_package(replace(as_written, cluster=settings.cluster))
    parameters = parameters_of(settings)
    return Submission(
        settings=settings,
        package=package,
        arguments={name: parameters[name] for name in PARAMETERS} | arguments,
        service_account=service_account or None,
        needs=needs,
    )


def planned(settings: Settings) -> tuple[Settings, Needs]:
    """Return the settings with the sizes of all pods that can be planned, and what the tasks take."""
    from core.steps.data_needs import data_disk_bytes
    from core.steps.needs import base_config, needs_of_tasks
    from core.steps.pod_sizes import asked_scratch, with_pod_sizes

    config = base_config(settings.model)
    needs = needs_of_tasks(config, settings) if config is not None else {}
    data_bytes = data_disk_bytes(settings) if asked_scratch(settings, "prepare-data") == AUTO else 0
    return with_pod_sizes(settings, needs, data_bytes=data_bytes), needs


def compile_package(settings: Settings) -> Package:
    """Compile the pipeline: equal settings give equal bytes."""
    with scratch_folder() as folder:
        path = folder / "pipeline.yaml"
        compile_pipeline(settings, path)
        content = path.read_bytes()
        spec, _ = read_ir(path)
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Package(content=content, version=f"{slug(settings.name)}-{digest}", tasks=dict(_tasks(spec)))


def slug(name: str) -> str:
    """Return a name as Kubernetes writes names, with room for a digest behind it."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or PIPELINE


def _tasks(spec: Document) -> Iterator[tuple[str, str]]:
    """Yield what runs in a pod, without the groups of tasks."""
    for name, component in (("root", spec["root"]), *spec["components"].items()):
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                shown = task.get("taskInfo", {}).get("name", task_name)
                yield task_name, f"phase {{}} {shown}" if name == "comp-phase" else shown


def _arguments(overrides: Iterable[str]) -> dict[str, Any]:
    """Read ``name=value`` overrides of the pipeline's parameters."""
    problems, found, known = [], dict[str, Any](), sorted([*PARAMETERS, "recipe"])
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            problems.append(f"--param {override} must read name=value, such as target=80%.")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
            problems.append(f"--param {name} is not a parameter of the pipeline. {hint}")
        elif name == "recipe":
            try:
                found[name] = load_yaml(text)
            except NOT_YAML:
                found[name] = None
            if not isinstance(found[name], dict):
                problems.append(f"--param {name}={text} must be a mapping. Correct it.")
        else:
            found[name] = text
    refuse(problems)
    return found


def out_of_reach(settings: Settings) -> Iterator[str]:
    """Yield the settings that name a place of this machine, which each pod would take for its own."""
    store, tracking = settings.storage.store, settings.tracking.uri
    if "://" not in store:
        yield (
            f"storage.store={store} is a folder of this machine, which pods do not share. Give "
            "s3://bucket/prefix, or file:///folder if all pods mount a volume there."
        )
    if tracking.startswith(("sqlite:", "file:")):
        yield (
            f"tracking.uri={tracking} is a file of this machine, which pods do not share. Give the http:// "
            "address of an MLflow server, or leave it empty: cluster.config_map may name one."
        )


def hints(settings: Settings) -> Iterator[str]:
    """Yield what is allowed but may not be intended."""
    image = settings.cluster.image
    if "@sha256:" not in image:
        yield f"cluster.image={image} is a tag, which may change under a run. Pin it: NAME@sha256:DIGEST."
    cluster = settings.cluster.of("recover-train")
    if cluster.gpus > 1 and re.search(r"/mig-|\.shared$", cluster.gpu_type):
        yield (
            f"recover-train asks for {cluster.gpus} of {cluster.gpu_type}, each a part of a GPU: a process "
            "sees one MIG device only, and slices may be of one GPU. Set its gpus to 1, or take whole GPUs."
        )
    if settings.storage.store.startswith("file:"):
        yield f"storage.store={settings.storage.store} must be one volume, mounted there in all pods."
    sources = [("calibration.source", settings.calibration.source)]
    sources += [(f"training.sources[{i}]", source) for i, source in enumerate(settings.training.sources)]
    sources.append(("evaluation.perplexity", settings.evaluation.perplexity))
    paths = [("model.base", settings.model.base)]
    paths += [(f"{name}.path", source.path) for name, source in sources if source is not None]
    for name, path in paths:
        if path.startswith("package:"):
            yield f"{name}={path} is part of a Python package. Pods find it only if their image contains it."
        elif "://" not in path and not path.startswith("models:") and Path(path).exists():
            yield f"{name}={path} is on this machine. Pods find it only if their image contains it, too."


def upload(client: Client, package: Package) -> tuple[str, str, bool]:
    """Return the ids of the pipeline and of the version, and whether it had to be uploaded."""
    body = kfp_server_api.V2beta1Pipeline(
        display_name=PIPELINE,
        name=PIPELINE,
        description="Prunes a language model a little at a time, with training in between.",
        namespace=client.namespace,
    )

    def pipeline() -> str:
        # Uploading to a pipeline that is not there would call its first version after the pipeline.
        created = client.pipelines.pipeline_service_create_pipeline
        return find_pipeline(client) or str(created(body).pipeline_id)

    def version() -> tuple[str, bool]:
        listed = client.list_pipeline_versions
        found = pages(listed, "pipeline_versions", pipeline_id=pipeline_id, filter=named(package.version))
        for each in found:
            if each.display_name == package.version:
                return str(each.pipeline_version_id), False
        with scratch_folder() as folder:
            path = folder / f"{package.version}.yaml"
            path.write_bytes(package.content)
            made = client.upload_pipeline_version(str(path), package.version, pipeline_id=pipeline_id)
        return str(made.pipeline_version_id), True

    with client.asked():
        pipeline_id = _found_or_made(pipeline)
        return pipeline_id, *_found_or_made(version)


def find_pipeline(client: Client) -> str:
    """Return the id of our pipeline, "" if nothing was ever submitted; of several, that of the oldest."""
    with client.asked():
        found = pages(client.list_pipelines, "pipelines", filter=named(PIPELINE), namespace=client.namespace)
        ours = [(str(each.created_at), str(each.pipeline_id)) for each in found]
    return min(ours)[1] if ours else ""


def experiment_id(client: Client, name: str) -> str:
    """Return the id of an experiment, which is created if needed."""
    with client.asked():
        return str(_found_or_made(lambda: client.create_experiment(name)).experiment_id)


def _found_or_made(find_or_make: Callable[[], T]) -> T:
    """Return what is found or made, also where somebody else makes it at the same time."""
    try:
        return find_or_make()
    except kfp_server_api.ApiException as error:
        if error.status != 409:
            raise
        return find_or_make()


def start(client: Client, submission: Submission, *, run_name: str, experiment: str) -> tuple[str, bool]:
    """Start a run; returns its id, and whether its version had to be uploaded."""
    pipeline, version, uploaded = upload(client, submission.package)
    place = experiment_id(client, experiment)
    with client.asked():
        run = client.run_pipeline(
            experiment_id=place,
            job_name=run_name,
            params=dict(submission.arguments),
            pipeline_id=pipeline,
            version_id=version,
            service_account=submission.service_account,
        )
    return str(run.run_id), uploaded
