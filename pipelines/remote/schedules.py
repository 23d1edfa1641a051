"""Recurring runs on Kubeflow Pipelines, one for each recipe, base model and target.

The API cannot change a recurring run: the new one is made before the old one goes. Whoever is killed between
the two leaves both, and giving the command again leaves one.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from core.errors import SettingsError
from core.settings.schema import Settings
from pipelines.remote.client import Client, explained, named, one_line, pages, quiet
from pipelines.remote.submission import Submission, experiment_id, find_pipeline, slug, upload

Outcome = Literal["created", "updated", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A recurring run of ours."""

    id: str
    name: str
    cron: str
    paused: bool
    base: str
    """The base model, as the run's parameters name it."""
    target: str
    version: str
    """Id of the pipeline's version."""
    created: str
    """When it was made."""


def schedule_name(settings: Settings) -> str:
    """Return the name of a recipe's recurring run.

    Equal for what makes the same model: the recipe's name, the base's address and the target. All else may be
    changed by giving the command again.
    """
    identity = [settings.model.base, settings.model.revision, settings.prune.target, settings.prune.method]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    return f"{slug(settings.name)}-{digest}"


def set_schedule(
    client: Client, submission: Submission, cron: str, *, experiment: str
) -> tuple[Schedule, Outcome]:
    """Make sure that there is one recurring run of the recipe, with this cron expression and these settings.

    A recurring run that is paused stays so.

    Args:
        client: The connection.
        submission: What each run is started with.
        cron: Six fields.
        experiment: Where the runs go.

    Returns:
        The recurring run, and what had to be done.

    Raises:
        ClusterError: If the cluster cannot be reached or refuses it.
    """
    settings = submission.settings
    name = schedule_name(settings)
    pipeline, version, _ = upload(client, submission.package)
    place = experiment_id(client, experiment)
    # The base and the target are given even where they are the version's defaults: lists show them.
    parameters = {
        "base_model": settings.model.base,
        "target": settings.prune.target,
        **submission.arguments,
    }
    wanted: dict[str, Any] = {
        "experiment_id": place,
        "pipeline_id": pipeline,
        "version_id": version,
        "cron": cron,
        "parameters": parameters,
    }
    if submission.service_account:
        wanted["service_account"] = submission.service_account
    with explained(client.place()), quiet():
        before = [each for each in _recurring(client, name) if each.display_name == name]
        before.sort(key=lambda each: (str(each.created_at), each.recurring_run_id))
        kept = next((each for each in before if wanted.items() <= _content(each).items()), None)
        outcome: Outcome = "unchanged" if kept else "updated" if before else "created"
        if kept is None:
            kept = client.create_recurring_run(
                experiment_id=place,
                job_name=name,
                description=f"adapt-pruner schedule: {settings.model.base} to {settings.prune.target}",
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=parameters,
                pipeline_id=pipeline,
                version_id=version,
                service_account=submission.service_account or None,
                enabled=not (before and all(_is_paused(each) for each in before)),
            )
        for each in before:
            if each.recurring_run_id != kept.recurring_run_id:
                client.delete_recurring_run(each.recurring_run_id)
    return _schedule(kept), outcome


def list_schedules(client: Client) -> list[Schedule]:
    """Return the recurring runs of our pipeline, by name.

    Raises:
        ClusterError: If the cluster cannot be reached or refuses it.
    """
    pipeline = find_pipeline(client)
    if not pipeline:
        return []
    with explained(client.place()), quiet():
        found = [
            _schedule(each)
            for each in _recurring(client)
            if each.pipeline_version_reference and each.pipeline_version_reference.pipeline_id == pipeline
        ]
    return sorted(found, key=lambda each: (each.name, each.created))


def change(client: Client, name: str, what: Literal["pause", "resume", "delete"]) -> int:
    """Pause, resume or delete the recurring run of this name; what is so already is no error.

    Returns:
        How many there were; more than one if an update was interrupted.

    Raises:
        SettingsError: If there is none of this name.
        ClusterError: If the cluster cannot be reached or refuses it.
    """
    known = list_schedules(client)
    found = [each for each in known if name in (each.name, each.id)]
    if not found:
        raise SettingsError([f"--{what}={name} is no schedule at {client.place()}. {_known(name, known)}"])
    call = {
        "pause": client.disable_recurring_run,
        "resume": client.enable_recurring_run,
        "delete": client.delete_recurring_run,
    }[what]
    with explained(client.place()), quiet():
        for each in found:
            call(each.id)
    return len(found)


def _known(name: str, known: Sequence[Schedule]) -> str:
    names = sorted({each.name for each in known})
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Known: {', '.join(names)}." if names else "There is none yet."


def _recurring(client: Client, name: str = "") -> list[Any]:
    selected = {"filter": named(name)} if name else {}
    return list(pages(client.list_recurring_runs, "recurring_runs", namespace=client.namespace, **selected))


def _content(recurring: Any) -> dict[str, Any]:
    """Return of a recurring run what ``set_schedule`` decides."""
    reference = recurring.pipeline_version_reference
    return {
        "experiment_id": recurring.experiment_id,
        "pipeline_id": reference.pipeline_id if reference else "",
        "version_id": reference.pipeline_version_id if reference else "",
        "cron": _cron(recurring),
        "parameters": _parameters(recurring),
        "service_account": recurring.service_account or "",
    }


def _parameters(recurring: Any) -> dict[str, Any]:
    return dict((recurring.runtime_config and recurring.runtime_config.parameters) or {})


def _cron(recurring: Any) -> str:
    schedule = recurring.trigger and recurring.trigger.cron_schedule
    return str(schedule.cron) if schedule else ""


def _is_paused(recurring: Any) -> bool:
    return "DISABLED" in str(recurring.status) or "DISABLE" in str(recurring.mode)


def _schedule(recurring: Any) -> Schedule:
    parameters = _parameters(recurring)
    reference = recurring.pipeline_version_reference
    return Schedule(
        id=str(recurring.recurring_run_id),
        name=one_line(str(recurring.display_name)),
        cron=one_line(_cron(recurring)),
        paused=_is_paused(recurring),
        base=one_line(str(parameters.get("base_model", ""))),
        target=one_line(str(parameters.get("target", ""))),
        version=str(reference.pipeline_version_id) if reference else "",
        created=str(recurring.created_at or ""),
    )
