"""``adapt-pruner schedule``: recurring runs on Kubeflow Pipelines."""

from pathlib import Path
from typing import Any, cast

import click

from core.errors import SettingsError
from pipelines.commands.access import access_options, prepared, run_options
from pipelines.commands.checking import check_first, check_option
from pipelines.commands.console import PATH, example, print_table, refuse_without


@click.command(
    epilog=example(
        'adapt-pruner schedule recipes/table1-llama-3.2-3b.yaml --cron "0 0 2 * * *" '
        "--host https://kubeflow.example.org/pipeline",
        "adapt-pruner schedule --list",
        "adapt-pruner schedule --pause table1-llama-3-2-3b-5f0c1a2b",
    )
)
@click.argument("recipe", type=PATH, required=False)
@click.option("--cron", help="When: second, minute, hour, day of the month, month, day of the week.")
@run_options
@click.option("--list", "list_", is_flag=True, help="List the schedules.")
@click.option("--pause", metavar="NAME", help="Start no more runs until --resume.")
@click.option("--resume", metavar="NAME", help="Start runs again.")
@click.option("--delete", metavar="NAME", help="Delete a schedule; refused while its run is in progress.")
@check_option(default=True)
@click.option("--now", is_flag=True, help="Delete or replace a schedule even if that ends its run.")
@access_options
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
    check: bool,
    now: bool,
    **access: Any,
) -> None:
    """Run RECIPE on Kubeflow Pipelines on a schedule.

    A run does work only if the base model has a new revision or the settings have changed; otherwise it ends
    after two small tasks. model.base may be a hub model (its newest commit), models:/name@alias in MLflow's
    registry, or a HEAD file that names the current checkpoint. Repeating the command updates the schedule of
    the same recipe, base and target. Times are UTC, unless the cluster sets CRON_SCHEDULE_TIMEZONE.
    """
    changes = {"pause": pause, "resume": resume, "delete": delete}
    asked = [name for name, value in changes.items() if value is not None]
    if (recipe is not None) + list_ + len(asked) != 1:
        raise SettingsError(["schedule takes one of RECIPE, --list, --pause, --resume and --delete."])
    of_recipes = ("cron", "overrides", "parameters", "service_account", "experiment", "check")
    refuse_without("RECIPE", recipe is not None, of_recipes)
    if now and recipe is None and delete is None:
        raise SettingsError(["--now needs RECIPE or --delete. Leave it out."])
    if recipe is not None and cron is None:
        raise SettingsError(
            ['--cron is missing. Say when, such as --cron "0 0 2 * * *" for every night at two.']
        )

    from pipelines.remote.client import connect
    from pipelines.remote.schedules import change, list_schedules, set_schedule, six_fields

    if recipe is not None:
        six = six_fields(str(cron))
        submission = prepared(recipe, overrides, parameters, service_account)
        client = connect(**access)
        checked = {"check": lambda: check_first(client, submission, experiment)} if check else {}
        made, outcome = set_schedule(client, submission, six, experiment=experiment, now=now, **checked)
        click.echo(f"{made.name}: {outcome}, {made.cron} (UTC unless the cluster says otherwise)")
        if made.paused:
            resume = f"adapt-pruner schedule --resume {made.name}"
            click.echo(f"hint: it is paused. Resume it by: {resume}", err=True)
        click.echo(client.link("recurringrun", made.id))
        return
    client = connect(**access)
    if asked:
        what, name = asked[0], str(changes[asked[0]])
        change(client, name, cast(Any, what), now=now)
        click.echo(f"{name}: {what}d")
        return
    found = list_schedules(client)
    if not found:
        click.echo(f"{client.place()} has no schedules of adapt-pruner.")
        return

    from rich.table import Table

    table = Table("name", "cron", "state", "base", "target", box=None)
    for each in found:
        table.add_row(each.name, each.cron, "paused" if each.paused else "active", each.base, each.target)
    print_table(table)
