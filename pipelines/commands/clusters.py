"""Commands that work on a cluster: start a run on Kubeflow Pipelines, or let it start by itself."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from core.errors import ClusterError, SettingsError
from pipelines.commands.console import example

if TYPE_CHECKING:
    from pipelines.remote.client import Access, Client
    from pipelines.remote.submission import StartedRun, Submission

_EXPERIMENT = "adapt-pruner"
_ACCESS = (
    click.option(
        "--host",
        envvar="KF_PIPELINES_ENDPOINT",
        show_envvar=True,
        default="",
        help="Address of Kubeflow Pipelines.",
    ),
    click.option("--namespace", default="", help="Yours, where Kubeflow serves several users."),
    click.option(
        "--token-file",
        envvar="KF_PIPELINES_SA_TOKEN_PATH",
        show_envvar=True,
        type=click.Path(path_type=Path),
        help="File of a bearer token, read again for each request. KFP_EXISTING_TOKEN may hold one instead.",
    ),
    click.option(
        "--cookie-file", type=click.Path(path_type=Path), help="File of the cookies of a login, in one line."
    ),
    click.option("--client-id", default="", help="Client id of Google's Identity-Aware Proxy."),
    click.option(
        "--other-client-id",
        default="",
        help="OAuth client id of your login to it; KF_PIPELINES_APP_OAUTH2_CLIENT_SECRET holds its secret.",
    ),
    click.option("--kube-context", default="", help="Go through the API server of this kubectl context."),
    click.option("--proxy", default="", help="Address of a proxy."),
    click.option("--ca-cert", type=click.Path(path_type=Path), help="Certificate authority of the host."),
    click.option("--no-verify-tls", is_flag=True, help="Take any certificate."),
)
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, such as prune.target=80%.",
)
_PARAM = click.option(
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override a parameter of the compiled pipeline, such as target=80%.",
)
_SERVICE_ACCOUNT = click.option(
    "--service-account",
    default="",
    help="Kubernetes service account of the pods.  [default: that of the installation]",
)
_IN_EXPERIMENT = click.option(
    "--experiment",
    envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME",
    show_envvar=True,
    default=_EXPERIMENT,
    show_default=True,
    help="Where the runs go; made if it is not there.",
)


def _with_access(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_ACCESS):
        command = option(command)
    return command


@click.command(
    epilog=example(
        "adapt-pruner submit recipes/table1-llama-3.2-3b.yaml --host https://kubeflow.example.org/pipeline "
        "--set storage.store=s3://models/pruning --wait"
    )
)
@click.argument("recipe", type=click.Path(path_type=Path))
@_SET
@_PARAM
@click.option(
    "--run-name", default="", help="What the run is called.  [default: the recipe's name and the time]"
)
@_IN_EXPERIMENT
@_SERVICE_ACCOUNT
@click.option("--wait", is_flag=True, help="Follow the run to its end; exit with 1 if it fails.")
@click.option("--timeout", default="0", help="With --wait: how long, such as 36h.  [default: for ever]")
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --wait: how many runs to start at most. Another follows one whose pod was deleted or evicted.",
)
@click.option("--every", default="10s", show_default=True, help="With --wait: how often to ask.")
@_with_access
def submit(
    recipe: Path,
    overrides: tuple[str, ...],
    parameters: tuple[str, ...],
    run_name: str,
    experiment: str,
    service_account: str,
    wait: bool,
    timeout: str,
    attempts: int,
    every: str,
    **access: Any,
) -> None:
    """Start RECIPE on Kubeflow Pipelines, and print the address of the run.

    The compiled pipeline is uploaded as a version of the pipeline adapt-pruner, unless it is there. A run of
    settings that were run before does nothing again: it ends at once, or goes on where it stopped.
    """
    timeout_s, poll_s = _seconds("timeout", timeout), _seconds("every", every)
    if not poll_s:
        raise SettingsError([f"--every={every} would ask without a pause. Give a time such as 10s."])
    if timeout_s and not wait:
        raise SettingsError(["--timeout goes with --wait. Add it, or leave --timeout out."])
    if attempts > 1 and not wait:
        raise SettingsError(["--attempts goes with --wait. Add it, or leave --attempts out."])
    submission = _prepared(recipe, overrides, parameters, service_account)
    client = _connected(access)

    if not run_name:
        run_name = f"{submission.settings.name} {_now()}"

    def begin(attempt: int) -> "StartedRun":
        name = run_name if attempt == 1 else f"{run_name} (attempt {attempt})"
        return _start(client, submission, run_name=name, experiment=experiment)

    if wait:
        _wait(client, submission, begin, attempts=attempts, timeout_s=timeout_s, poll_s=poll_s)
    else:
        begin(1)


@click.command(
    epilog=example(
        'adapt-pruner schedule recipes/table1-llama-3.2-3b.yaml --cron "0 0 2 * * *" '
        "--host https://kubeflow.example.org/pipeline",
        "adapt-pruner schedule --list",
        "adapt-pruner schedule --pause table1-llama-3-2-3b-5f0c1a2b",
    )
)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--cron", help="When: second, minute, hour, day of the month, month, day of the week.")
@_SET
@_PARAM
@_IN_EXPERIMENT
@_SERVICE_ACCOUNT
@click.option("--list", "list_", is_flag=True, help="Show the schedules.")
@click.option("--pause", metavar="NAME", help="Start no more runs until it is resumed.")
@click.option("--resume", metavar="NAME", help="Start runs again.")
@click.option(
    "--delete",
    metavar="NAME",
    help="Remove a schedule. Kubernetes ends its run that is under way; the next start resumes it.",
)
@_with_access
def schedule(
    recipe: Path | None,
    cron: str | None,
    overrides: tuple[str, ...],
    parameters: tuple[str, ...],
    experiment: str,
    service_account: str,
    list_: bool,
    pause: str | None,
    resume: str | None,
    delete: str | None,
    **access: Any,
) -> None:
    """Start RECIPE on Kubeflow Pipelines again and again, by the clock.

    A run does work only if the base model has a new revision, or the settings have changed; else it ends
    after two small tasks. model.base may be a hub model (its newest commit), models:/name@alias in MLflow's
    registry, or a HEAD file that names the current checkpoint. Giving the command again changes the schedule
    of the same recipe, base and target. Times are UTC, unless the cluster's CRON_SCHEDULE_TIMEZONE says
    otherwise.
    """
    changes = {"pause": pause, "resume": resume, "delete": delete}
    asked = [name for name, value in changes.items() if value is not None]
    if (recipe is not None) + list_ + len(asked) != 1:
        raise SettingsError(["schedule takes RECIPE, --list, --pause, --resume or --delete: one of them."])
    if recipe is not None:
        expression = _expression(cron)
        submission = _prepared(recipe, overrides, parameters, service_account)
        _set_schedule(_connected(access), submission, expression, experiment)
    elif cron is not None or overrides or parameters or service_account:
        raise SettingsError(["--cron, --set, --param and --service-account go with RECIPE. Leave them out."])
    elif list_:
        _list_schedules(_connected(access))
    else:
        _change_schedule(_connected(access), cast(Any, asked[0]), str(changes[asked[0]]))


def _expression(cron: str | None) -> str:
    from pipelines.remote.cron import six_fields

    if cron is None:
        raise SettingsError(
            ['--cron is missing. Say when, such as --cron "0 0 2 * * *" for every night at two.']
        )
    return six_fields(cron)


def _set_schedule(client: "Client", submission: "Submission", expression: str, experiment: str) -> None:
    from pipelines.remote.schedules import list_schedules, set_schedule
    from pipelines.remote.submission import slug

    made, outcome = set_schedule(client, submission, expression, experiment=experiment)
    click.echo(f"{made.name}: {outcome}, {made.cron} (UTC unless the cluster says otherwise)")
    if made.paused:
        click.echo(f"hint: it is paused. Start it by: adapt-pruner schedule --resume {made.name}", err=True)
    start = slug(submission.settings.name)
    for other in sorted({each.name for each in list_schedules(client)} - {made.name}):
        if other.rpartition("-")[0] == start:
            click.echo(
                f"hint: {other} is the same recipe with another base or target. If it is not wanted any "
                f"more: adapt-pruner schedule --delete {other}",
                err=True,
            )
    click.echo(client.link("recurringrun", made.id))


def _list_schedules(client: "Client") -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.remote.schedules import list_schedules

    found = list_schedules(client)
    if not found:
        click.echo(f"{client.place()} has no schedule of adapt-pruner.")
        return
    table = Table("name", "cron", "state", "base", "target", box=None)
    for each in found:
        table.add_row(each.name, each.cron, "paused" if each.paused else "active", each.base, each.target)
    width = None if os.isatty(1) else 1000  # what reads a pipe wants a line a row
    Console(highlight=False, markup=False, width=width).print(table)


def _change_schedule(client: "Client", what: Literal["pause", "resume", "delete"], name: str) -> None:
    from pipelines.remote.schedules import change

    change(client, name, what)
    click.echo(f"{name}: {what}d")


def _prepared(
    recipe: Path, overrides: tuple[str, ...], parameters: tuple[str, ...], service_account: str
) -> "Submission":
    from core.settings.recipe import load_recipe

    settings = load_recipe(recipe, overrides)

    from pipelines.remote.submission import hints, prepare

    submission = prepare(settings, parameters, service_account=service_account)
    for hint in hints(submission.settings):
        click.echo(f"hint: {hint}", err=True)
    return submission


def _connected(options: dict[str, Any]) -> "Client":
    from pipelines.remote.client import connect

    return connect(_access(**options))


def _access(*, no_verify_tls: bool, **options: Any) -> "Access":
    from pipelines.remote.client import Access

    secret = os.environ.get("KF_PIPELINES_APP_OAUTH2_CLIENT_SECRET", "")
    token = os.environ.get("KFP_EXISTING_TOKEN", "")
    return Access(**options, token=token, other_client_secret=secret, verify_tls=not no_verify_tls)


def _seconds(option: str, text: str) -> float:
    from core.quantities import parse_interval

    try:
        interval = parse_interval(text)
        if interval.steps:
            raise ValueError
    except ValueError:
        raise SettingsError([f"--{option}={text} is no time. Give one such as 30s, 90min or 36h."]) from None
    return interval.seconds


def _start(client: "Client", submission: "Submission", *, run_name: str, experiment: str) -> "StartedRun":
    from pipelines.remote.submission import start

    started = start(client, submission, run_name=run_name, experiment=experiment)
    state = "uploaded" if started.uploaded else "was there"
    click.echo(f"version {started.version} of pipeline adapt-pruner: {state}", err=True)
    click.echo(started.link)
    return started


def _wait(
    client: "Client",
    submission: "Submission",
    begin: Callable[[int], "StartedRun"],
    *,
    attempts: int,
    timeout_s: float,
    poll_s: float,
) -> None:
    """Start a run and follow it, and start another after one that was taken away."""
    from rich.console import Console

    from pipelines.remote.following import Patience, follow
    from pipelines.remote.view import RunView

    package, console = submission.package, Console(stderr=True, highlight=False)
    patience = Patience(timeout_s=timeout_s, poll_s=poll_s)
    for attempt in range(1, attempts + 1):
        started = begin(attempt)
        try:
            with RunView(console, package.tasks) as view:
                ended = follow(client, started.id, package.tasks, view.show, patience)
        except KeyboardInterrupt:
            click.echo(f"error: interrupted; the run goes on: {started.link}", err=True)
            click.get_current_context().exit(130)
        if ended.trouble is None:
            click.echo("succeeded", err=True)
            return
        if attempt == attempts or not ended.was_taken_away:
            raise ClusterError(f"{ended.trouble.text} {started.link}")
        click.echo(f"{ended.trouble.text}\nAttempt {attempt + 1} of {attempts}:", err=True)


def _now() -> str:
    import datetime

    return datetime.datetime.now().strftime("%Y-%m-%d %H-%M-%S")
