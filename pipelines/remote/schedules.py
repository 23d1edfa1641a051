"""Recurring runs on Kubeflow Pipelines, one for each recipe, base model and target.

kfp's client creates and deletes recurring runs; the API cannot change one. So the new one is created before
the old one is deleted. If the update is killed between the two, both are left, and repeating the command
leaves one. Deleting a recurring run ends its run in progress, since Kubernetes deletes the workflow with its
owner: that takes ``now``. All raise a ``ClusterError`` if the cluster cannot be reached or refuses.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from core.errors import ClusterError, SettingsError
from core.settings.schema import Settings
from pipelines.remote.client import Client, named, one_line, pages
from pipelines.remote.following import ENDED
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


def six_fields(cron: str) -> str:
    """Return a cron expression with seconds first, as the server wants it; the server checks the values.

    Five fields, as cron itself has them, get seconds: the server would take their first field for those.

    Raises:
        SettingsError: If it has other than five or six fields.
    """
    fields = cron.split()
    if len(fields) not in (5, 6):
        raise SettingsError(
            [
                f"--cron={cron!r} must have six fields: second, minute, hour, day of the month, month and "
                'day of the week, such as "0 0 2 * * *" for every night at two. Correct it.'
            ]
        )
    return " ".join(fields if len(fields) == 6 else ["0", *fields])


def schedule_name(settings: Settings) -> str:
    """Return the name of a recipe's recurring run.

    Equal for what makes the same model: the recipe's name, the base's address and the target. All else may be
    changed by repeating the command.
    """
    identity = [settings.model.base, settings.model.revision, settings.prune.target, settings.prune.method]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    return f"{slug(settings.name)}-{digest}"


def set_schedule(
    client: Client,
    submission: Submission,
    cron: str,
    *,
    experiment: str,
    now: bool = False,
    check: Callable[[], None] = lambda: None,
) -> tuple[Schedule, Outcome]:
    """Make sure that there is one recurring run of the recipe, with this cron expression and these settings.

    One that is paused stays so. ``now`` replaces one even if that ends its run in progress. ``check`` is
    called before anything is changed; what it raises keeps things as they are.

    Returns:
        The recurring run, and what had to be done.
    """
    settings = submission.settings
    name = schedule_name(settings)
    pipeline, version, _ = upload(client, submission.package)
    wanted = {
        "experiment_id": experiment_id(client, experiment),
        "pipeline_id": pipeline,
        "version_id": version,
        "cron_expression": cron,
        "params": dict(submission.arguments),
        "service_account": submission.service_account,
    }
    with client.asked():
        before = sorted(
            _recurring(client, name), key=lambda each: (str(each.created_at), each.recurring_run_id)
        )
        kept = next((each for each in before if _has(each, wanted)), None)
        others = [each for each in before if each is not kept]
        if not now:
            _refuse_to_end(client, others)
    if kept is None:
        check()
    with client.asked():
        outcome: Outcome = "unchanged" if kept else "updated" if before else "created"
        if kept is None:
            kept = client.create_recurring_run(
                **wanted,
                job_name=name,
                description=f"adapt-pruner schedule: {settings.model.base} to {settings.prune.target}",
                max_concurrency=1,
                no_catchup=True,
                enabled=not before or not all(map(_is_paused, before)),
            )
        for each in others:
            client.delete_recurring_run(each.recurring_run_id)
    return _schedule(kept), outcome


def list_schedules(client: Client) -> list[Schedule]:
    """Return the recurring runs of our pipeline, by name."""
    return [_schedule(each) for each in _ours(client)]


def change(
    client: Client, name: str, what: Literal["pause", "resume", "delete"], *, now: bool = False
) -> None:
    """Pause, resume or delete the recurring run of this name or id, and those that interrupted updates left.

    Args:
        client: The connection.
        name: Its name or id.
        what: What to do.
        now: Delete it even if that ends its run in progress.

    Raises:
        SettingsError: If there is none of this name.
    """
    known = _ours(client)
    found = [each for each in known if name in (each.display_name, each.recurring_run_id)]
    if not found:
        names = ", ".join(sorted({one_line(each.display_name) for each in known})) or "none"
        raise SettingsError([f"--{what}={name} is not a schedule at {client.place()}. Known: {names}."])
    call = {
        "pause": client.disable_recurring_run,
        "resume": client.enable_recurring_run,
        "delete": client.delete_recurring_run,
    }[what]
    with client.asked():
        if what == "delete" and not now:
            _refuse_to_end(client, found)
        for each in found:
            call(each.recurring_run_id)


def _refuse_to_end(client: Client, recurring: Iterable[Any]) -> None:
    """Refuse to delete recurring runs of which a run is in progress.

    Only their experiment lists their runs. It is read from the newest back to the last run of each, or to
    what is older than it.
    """
    for each in recurring:
        runs = pages(client.list_runs, "runs", experiment_id=each.experiment_id, sort_by="created_at desc")
        for run in runs:
            if run.created_at < each.created_at:
                break
            if run.recurring_run_id == each.recurring_run_id:
                if run.state not in ENDED:
                    raise ClusterError(
                        f"the run in progress of schedule {one_line(each.display_name)} would end with it. "
                        "Wait for its end, or give --now, and the next run resumes it: "
                        f"{client.link('runs', run.run_id)}"
                    )
                break


def _ours(client: Client) -> list[Any]:
    """Return the recurring runs of our pipeline, by name and age."""
    pipeline = find_pipeline(client)
    if not pipeline:
        return []
    with client.asked():
        found = [each for each in _recurring(client) if _reference(each).get("pipeline_id") == pipeline]
    return sorted(found, key=lambda each: (each.display_name, str(each.created_at)))


def _recurring(client: Client, name: str = "") -> list[Any]:
    selected = {"filter": named(name)} if name else {}
    return list(pages(client.list_recurring_runs, "recurring_runs", namespace=client.namespace, **selected))


def _reference(recurring: Any) -> dict[str, Any]:
    return recurring.pipeline_version_reference.to_dict() if recurring.pipeline_version_reference else {}


def _has(recurring: Any, wanted: Mapping[str, Any]) -> bool:
    """Return whether a recurring run is as ``set_schedule`` wants it; None leaves it to the server."""
    reference = _reference(recurring)
    found = {
        "experiment_id": recurring.experiment_id,
        "pipeline_id": reference.get("pipeline_id"),
        "version_id": reference.get("pipeline_version_id"),
        "cron_expression": _cron(recurring),
        "params": _parameters(recurring),
        "service_account": recurring.service_account,
    }
    return all(found[key] == value for key, value in wanted.items() if value is not None)


def _parameters(recurring: Any) -> dict[str, Any]:
    return dict((recurring.runtime_config and recurring.runtime_config.parameters) or {})


def _cron(recurring: Any) -> str:
    schedule = recurring.trigger and recurring.trigger.cron_schedule
    return str(schedule.cron) if schedule else ""


def _is_paused(recurring: Any) -> bool:
    return "DISABLED" in str(recurring.status) or "DISABLE" in str(recurring.mode)


def _schedule(recurring: Any) -> Schedule:
    parameters = _parameters(recurring)
    return Schedule(
        id=str(recurring.recurring_run_id),
        name=one_line(str(recurring.display_name)),
        cron=one_line(_cron(recurring)),
        paused=_is_paused(recurring),
        base=one_line(str(parameters.get("base_model", ""))),
        target=one_line(str(parameters.get("target", ""))),
    )
