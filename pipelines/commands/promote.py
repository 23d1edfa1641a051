"""``adapt-pruner promote``: moves the alias ``champion`` in MLflow's registry, if a rule says so."""

import sys
from typing import TYPE_CHECKING, Any

import click

from core.errors import SettingsError
from core.settings.registry import RegistrySettings
from pipelines.commands.console import example, log_on_stderr, print_table, printable

if TYPE_CHECKING:
    from core.steps.promotion import Decision

NOT_PROMOTED = 3
"""Exit status of a decision against the version."""


@click.command(
    epilog=example(
        "adapt-pruner promote small-model --dry-run",
        "adapt-pruner promote small-model --metric accuracy --margin 0.005",
    ),
    help="Promote a version of registered model NAME, if it is not worse.\n\n"
    "The version is compared with the one that has the alias champion in MLflow's registry. The alias moves "
    "if the whole 95 % interval of how much worse the version is lies within the margin. The decision is "
    "printed, and written into the version's description and the artifacts of its run.\n\n"
    f"Exit status: 0 the version is the champion now, {NOT_PROMOTED} it is not; with --dry-run, would be or "
    "would not be.",
)
@click.argument("name")
@click.option("--version", default="candidate", show_default=True, help="Number or alias of the version.")
@click.option("--metric", help="perplexity, a task, or accuracy, the mean over tasks.  [default: perplexity]")
@click.option(
    "--margin",
    type=click.FloatRange(0, 1),
    help="How much worse it may be: a share of the perplexity, or points / 100.  [default: 0.01]",
)
@click.option("--no-first", is_flag=True, help="Promote nothing where there is no champion yet.")
@click.option(
    "--tracking-uri", envvar="MLFLOW_TRACKING_URI", show_envvar=True, default="", help="MLflow's address."
)
@click.option("--dry-run", is_flag=True, help="Decide, and change nothing.")
def promote(
    name: str,
    version: str,
    metric: str | None,
    margin: float | None,
    no_first: bool,
    tracking_uri: str,
    dry_run: bool,
) -> None:
    """Decide whether a version becomes the champion."""
    if not tracking_uri:
        raise SettingsError(["promote needs MLflow. Give --tracking-uri, or set MLFLOW_TRACKING_URI."])

    from core.steps.promotion import promote as decide_on
    from core.tracking.client import absolute_uri
    from core.tracking.registry import Registry

    given: dict[str, Any] = {"metric": metric, "margin": margin, "first": False if no_first else None}
    rule = RegistrySettings(**{key: value for key, value in given.items() if value is not None})
    with log_on_stderr():
        decision = decide_on(Registry(absolute_uri(tracking_uri), name), rule, version, dry_run=dry_run)
    _show(decision)
    click.echo(printable(f"{decision.sentence}{' Nothing was changed.' if dry_run else ''}"))
    sys.exit(0 if decision.promoted else NOT_PROMOTED)


def _show(decision: "Decision") -> None:
    from rich.table import Table

    if decision.comparison is None:
        return
    table = Table("measure", box=None)
    table.add_column(f"version {decision.version}", justify="right")
    table.add_column(f"champion, version {decision.champion}", justify="right")
    for row in decision.rows():
        table.add_row(*map(printable, row))
    print_table(table)
    click.echo(printable(f"Interval: {decision.comparison.how}."))
