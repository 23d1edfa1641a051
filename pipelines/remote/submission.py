"""Submitting: the compiled pipeline becomes a version on Kubeflow Pipelines, and a run of it.

A version is named after the digest of its content: what is there already is not uploaded again.
"""

import difflib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from core.errors import ClusterError, refuse
from core.settings.recipe import settings_from_dict, with_fixed
from core.settings.schema import Settings
from pipelines.adapt_accel import compile_pipeline, fixed_settings
from pipelines.remote.client import Client, explained, named, pages, quiet

PIPELINE = "adapt-pruner"
"""Name of the pipeline on the cluster; each recipe and number of phases is a version of it."""

_SETTING_OF = {
    "base_model": ("model", "base"),
    "revision": ("model", "revision"),
    "target": ("prune", "target"),
    "method": ("prune", "method"),
}
_TYPES: dict[str, tuple[type, str]] = {
    "STRING": (str, "a text"),
    "NUMBER_INTEGER": (int, "a whole number"),
    "NUMBER_DOUBLE": (float, "a number"),
    "BOOLEAN": (bool, "true or false"),
    "STRUCT": (dict, "a mapping"),
    "LIST": (list, "a list"),
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A compiled pipeline."""

    content: bytes
    """The YAML."""
    version: str
    """Name of the version: the recipe's name and the digest of ``content``."""
    parameters: Mapping[str, Mapping[str, Any]]
    """Parameter to what the IR says of it: ``parameterType``, ``isOptional``, ``defaultValue``."""
    tasks: Mapping[str, str]
    """Task in the IR to how people call it; ``{}`` stands for the phase of what each phase does."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a run is started, or scheduled, with."""

    settings: Settings
    """With the overrides of ``arguments``."""
    package: Package
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Pipeline parameters that differ from their defaults."""
    service_account: str = ""
    """Kubernetes service account of the pods; "" for that of the installation."""


def prepare(settings: Settings, overrides: Iterable[str] = (), *, service_account: str = "") -> Submission:
    """Compile the pipeline, and check everything that can be checked without the cluster.

    Args:
        settings: The recipe.
        overrides: ``name=value`` for parameters of the compiled pipeline.
        service_account: Kubernetes service account of the pods; "" for that of the installation.

    Raises:
        SettingsError: If a parameter is unknown, missing, of the wrong type or out of range, or a setting
            names a place of this machine.
    """
    package = compile_package(settings)
    arguments = arguments_of(package.parameters, overrides)
    if "recipe" in arguments:
        arguments["recipe"] = {"name": settings.name} | arguments["recipe"]
    settings = _overridden(settings, arguments)
    refuse(out_of_reach(settings))
    return Submission(
        settings=settings, package=package, arguments=arguments, service_account=service_account
    )


def compile_package(settings: Settings) -> Package:
    """Compile the pipeline: equal settings give equal bytes."""
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(settings, path)
        content = path.read_bytes()
    spec = next(yaml.load_all(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Package(
        content=content,
        version=f"{slug(settings.name)}-{digest}",
        parameters=spec["root"].get("inputDefinitions", {}).get("parameters", {}),
        tasks=dict(_tasks(spec)),
    )


def slug(name: str) -> str:
    """Return a name as Kubernetes writes names, with room for a digest behind it."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or PIPELINE


def _tasks(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what runs in a pod, without the groups of tasks."""
    for name, component in (("root", spec["root"]), *spec["components"].items()):
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                shown = task.get("taskInfo", {}).get("name", task_name)
                yield task_name, f"phase {{}} {shown}" if name.startswith("comp-phase") else shown


def arguments_of(parameters: Mapping[str, Mapping[str, Any]], overrides: Iterable[str]) -> dict[str, Any]:
    """Read ``name=value`` overrides by what the IR says of the pipeline's parameters.

    Raises:
        SettingsError: With every unknown or missing name and every value of another type.
    """
    problems, found = [], {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            problems.append(f"--param {override} must read name=value, such as target=80%.")
        elif name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(parameters))}."
            problems.append(f"--param {name} is no parameter of the pipeline. {hint}")
        else:
            kind, words = _TYPES[parameters[name]["parameterType"]]
            value = text if kind is str else _parsed(text)
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                problems.append(f"--param {name}={text} must be {words}. Correct it.")
            found[name] = value
    for name, parameter in parameters.items():
        if name not in found and not parameter.get("isOptional") and "defaultValue" not in parameter:
            problems.append(f"--param {name} is missing: the pipeline has no default for it. Give it.")
    refuse(problems)
    return found


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _overridden(settings: Settings, arguments: Mapping[str, Any]) -> Settings:
    """Return the settings that the run will have, by the rules that its first task applies."""
    if not arguments:
        return settings
    data = settings.to_dict()
    if "recipe" in arguments:
        own, fixed = data, fixed_settings(settings, settings.prune.phases)
        data = with_fixed(arguments["recipe"], fixed) | {"cluster": own["cluster"]}
        for section, key in _SETTING_OF.values():
            data[section] = {**data.get(section, {}), key: own[section][key]}
    for name, value in arguments.items():
        if name in _SETTING_OF:
            section, key = _SETTING_OF[name]
            data[section][key] = value
    return settings_from_dict(data)


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
    """Yield what is allowed and may yet be meant otherwise."""
    image = settings.cluster.image
    if "@sha256:" not in image:
        yield f"cluster.image={image} is a tag, which may change under a run. Pin it: NAME@sha256:DIGEST."
    if settings.storage.store.startswith("file:"):
        yield f"storage.store={settings.storage.store} must be one volume, mounted there in all pods."
    sources = [("calibration.source", settings.calibration.source)]
    sources += [(f"training.sources[{i}]", source) for i, source in enumerate(settings.training.sources)]
    sources.append(("evaluation.perplexity", settings.evaluation.perplexity))
    paths = [("model.base", settings.model.base)]
    paths += [(f"{name}.path", source.path) for name, source in sources if source is not None]
    for name, path in paths:
        if path.startswith("package:"):
            yield f"{name}={path} is part of a Python package. Pods find it only if their image holds that."
        elif "://" not in path and not path.startswith("models:") and Path(path).exists():
            yield f"{name}={path} lies on this machine. Pods find it only if their image holds it, too."


def upload(client: Client, package: Package) -> tuple[str, str, bool]:
    """Make sure that the version is there.

    Args:
        client: The connection.
        package: What to upload.

    Returns:
        Ids of the pipeline and of the version, and whether it had to be uploaded.

    Raises:
        ClusterError: If the cluster cannot be reached or refuses it.
    """
    with explained(client.place()), quiet():
        pipeline = _pipeline_id(client, create=True)
        version = _version_id(client, pipeline, package.version)
        if version:
            return pipeline, version, False
        with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
            path = Path(folder) / f"{package.version}.yaml"
            path.write_bytes(package.content)
            try:
                made = client.upload_pipeline_version(str(path), package.version, pipeline_id=pipeline)
                return pipeline, str(made.pipeline_version_id), True
            except kfp_server_api.ApiException as error:
                if error.status != 409:
                    raise
        version = _version_id(client, pipeline, package.version)  # somebody else was faster
    if not version:
        raise ClusterError(
            f"{client.place()} says that version {package.version} exists, and does not list it. Look at "
            f"pipeline {PIPELINE} in its UI."
        )
    return pipeline, version, False


def find_pipeline(client: Client) -> str:
    """Return the id of our pipeline, "" if nothing was ever submitted."""
    with explained(client.place()), quiet():
        return _pipeline_id(client, create=False)


def _pipeline_id(client: Client, *, create: bool) -> str:
    def find() -> str:
        found = pages(client.list_pipelines, "pipelines", filter=named(PIPELINE), namespace=client.namespace)
        ours = [pipeline for pipeline in found if pipeline.display_name == PIPELINE]
        # Of several, as a server of old may hold them, always the same one.
        return (
            str(min(ours, key=lambda each: (str(each.created_at), each.pipeline_id)).pipeline_id)
            if ours
            else ""
        )

    pipeline = find()
    if pipeline or not create:
        return pipeline
    body = kfp_server_api.V2beta1Pipeline(
        display_name=PIPELINE,
        name=PIPELINE,
        description="Prunes a language model a little at a time, with training in between.",
        namespace=client.namespace,
    )
    try:
        # Uploading to a pipeline that is not there would call its first version after the pipeline.
        return str(client.pipelines.pipeline_service_create_pipeline(body).pipeline_id)
    except kfp_server_api.ApiException as error:
        if error.status != 409:
            raise
        return find()  # somebody else was faster


def _version_id(client: Client, pipeline: str, name: str) -> str:
    found = pages(
        client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline, filter=named(name)
    )
    return next((str(version.pipeline_version_id) for version in found if version.display_name == name), "")


def experiment_id(client: Client, name: str) -> str:
    """Return the id of an experiment, which is created where it is missing."""
    with explained(client.place()), quiet():
        try:
            return str(client.create_experiment(name, namespace=client.namespace).experiment_id)
        except kfp_server_api.ApiException as error:
            if error.status != 409:
                raise
            found = client.get_experiment(experiment_name=name, namespace=client.namespace)
            return str(found.experiment_id)  # somebody else was faster


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """A run that was started."""

    id: str
    link: str
    version: str
    uploaded: bool
    """Whether the version was new."""


def start(client: Client, submission: Submission, *, run_name: str, experiment: str) -> StartedRun:
    """Upload what is missing, and start a run.

    Raises:
        ClusterError: If the cluster cannot be reached or refuses it.
    """
    package = submission.package
    pipeline, version, uploaded = upload(client, package)
    place = experiment_id(client, experiment)
    with explained(client.place()), quiet():
        run = client.run_pipeline(
            experiment_id=place,
            job_name=run_name,
            params=dict(submission.arguments),
            pipeline_id=pipeline,
            version_id=version,
            service_account=submission.service_account or None,
        )
    return StartedRun(
        id=run.run_id, link=client.link("runs", run.run_id), version=package.version, uploaded=uploaded
    )
