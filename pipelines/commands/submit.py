"""``adapt-pruner submit``: a run on Kubeflow Pipelines."""

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.errors import ClusterError, SettingsError
from pipelines.commands.access import access_options, prepared, run_options
from pipelines.commands.checking import check_first, check_option
from pipelines.commands.console import PATH, example, refuse_without

if TYPE_CHECKING:
    from pipelines.remote.client import Client
    from pipelines.remote.following import Progress


@click.command(
    epilog=example(
        "adapt-pruner submit recipes/table1-llama-3.2-3b.yaml --host https://kubeflow.example.org/pipeline "
        "--set storage.store=s3://models/pruning --wait"
    )
)
@click.argument("recipe", type=PATH)
@run_options
@click.option("--run-name", default="", help="Name of the run.  [default: the recipe's name and the time]")
@check_option(default=False)
@click.option("--wait", is_flag=True, help="Follow the run until it ends; exit with 1 if it fails.")
@click.option("--timeout", default="0", help="With --wait: longest wait, such as 36h.  [default: no limit]")
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --wait: most runs to start; another one follows a run that lost its pods.",
)
@click.option("--every", default="10s", show_default=True, help="With --wait: polling interval.")
@access_options
def submit(
    recipe: Path,
    overrides: tuple[str, ...],
    parameters: tuple[str, ...],
    experiment: str,
    service_account: str,
    run_name: str,
    check: bool,
    wait: bool,
    timeout: str,
    attempts: int,
    every: str,
    **access: Any,
) -> None:
    """Run RECIPE on Kubeflow Pipelines.

    Prints the address of the run. The compiled pipeline is uploaded as a version of the pipeline
    adapt-pruner, unless that version exists. A run with the settings of an earlier one ends at once, or
    resumes it.
    """
    timeout_s, poll_s = seconds_of("timeout", timeout), pause_of(every)
    refuse_without("--wait", wait, ("timeout", "attempts", "every"))
    submission = prepared(recipe, overrides, parameters, service_account)

    from pipelines.remote.client import connect
    from pipelines.remote.submission import start

    client = connect(**access)
    if check:
        check_first(client, submission, experiment)
    run_name = run_name or f"{submission.settings.name} {datetime.datetime.now():%Y-%m-%d %H-%M-%S}"

    until = time.monotonic() + timeout_s if timeout_s else None
    for attempt in range(1, attempts + 1):
        name = run_name if attempt == 1 else f"{run_name} (attempt {attempt})"
        run_id, uploaded = start(client, submission, run_name=name, experiment=experiment)
        state = "uploaded" if uploaded else "already there"
        click.echo(f"version {submission.package.version} of pipeline adapt-pruner: {state}", err=True)
        click.echo(client.link("runs", run_id))
        if not wait:
            return
        ended = _follow(client, run_id, submission.package.tasks, poll_s, until)
        if ended.trouble is None:
            click.echo("succeeded", err=True)
            return
        if attempt == attempts or not ended.lost_pods:
            raise ClusterError(f"{ended.trouble.text} {client.link('runs', run_id)}")
        click.echo(f"{ended.trouble.text}\nAttempt {attempt + 1} of {attempts}:", err=True)


def _follow(
    client: "Client", run_id: str, tasks: Mapping[str, str], poll_s: float, until: float | None
) -> "Progress":
    from rich.console import Console

    from pipelines.remote.following import follow
    from pipelines.remote.view import RunView

    view = RunView(Console(stderr=True, highlight=False), tasks)
    try:
        return follow(client, run_id, tasks, view.show, poll_s=poll_s, until=until)
    except KeyboardInterrupt:
        click.echo(f"error: interrupted; the run continues: {client.link('runs', run_id)}", err=True)
        click.get_current_context().exit(130)


def pause_of(every: str) -> float:
    """Read the option --every: how long to wait between two requests."""
    if not (poll_s := seconds_of("every", every)):
        raise SettingsError([f"--every={every} leaves no pause between requests. Give a time such as 10s."])
    return poll_s


def seconds_of(option: str, text: str) -> float:
    """Read the time that an option gives."""
    from core.quantities import parse_interval

    try:
        interval = parse_interval(text)
        if interval.steps:
            raise ValueError
    except ValueError:
        raise SettingsError(
            [f"--{option}={text} is not a time. Give one such as 30s, 90min or 36h."]
        ) from None
    return interval.seconds
