"""``adapt-pruner clean``: removes orphaned files from a store."""

import os
import sys
from typing import TYPE_CHECKING

import click

from core.errors import SettingsError
from pipelines.commands.console import (
    STORE_HELP,
    example,
    log_on_stderr,
    opened_store,
    print_table,
    printable,
)

if TYPE_CHECKING:
    from core.storage.garbage import Findings
    from core.storage.interface import Store

_SHOWN = 10


@click.command(
    epilog=example("adapt-pruner clean output/store"),
    help="Remove orphaned files from STORE.\n\n"
    "Orphaned are leftovers of killed tasks and interrupted uploads, training states of published phases, "
    "leases and job files of ended runs. They are listed first and removed after confirmation. Runs in "
    "progress are left alone, and so is everything that an "
    "interrupted run needs to resume. Runs that have died are closed in MLflow, where they would count as "
    f"running. {STORE_HELP}.",
)
@click.argument("store")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def clean(store: str, yes: bool) -> None:
    """Remove orphaned files from a store."""
    opened = opened_store(store)

    from core.quantities import bytes_text
    from core.storage.garbage import clean as remove_garbage
    from core.storage.garbage import find_garbage
    from core.storage.owner import Owner

    with log_on_stderr():
        found = find_garbage(opened)
        _show_findings(found)
        files = [file for piece in found.garbage for file in piece.files]
        if not files:
            click.echo("Nothing to remove.")
            _close_dead_runs(opened)
            return
        click.echo(f"To remove: {len(files)} files, {bytes_text(sum(file.size for file in files))}.")
        if not yes and not sys.stdin.isatty():
            raise SettingsError(["clean asks for confirmation, but stdin is not a terminal. Give --yes."])
        if not yes and not click.confirm("Remove them?"):
            click.echo("Nothing was removed.")
            return
        _close_dead_runs(opened)  # before their leases go, which tell of their end
        removed = remove_garbage(opened, found.garbage, Owner.of(f"clean-{os.getpid()}", pid=os.getpid()))
    click.echo(f"Removed {len(removed)} files, {bytes_text(sum(file.size for file in removed))}.")


def _close_dead_runs(store: "Store") -> None:
    from core.steps.closing import close_dead_runs_of

    for closed in close_dead_runs_of(store):
        click.echo(f"Closed in MLflow: {printable(closed)}")


def _show_findings(found: "Findings") -> None:
    from rich.table import Table

    from core.quantities import bytes_text

    table = Table("where", "what", box=None)
    table.add_column("files", justify="right")
    table.add_column("size", justify="right")
    for piece in found.garbage:
        size = bytes_text(sum(file.size for file in piece.files))
        table.add_row(printable(piece.place), piece.reason, str(len(piece.files)), size)
    if found.garbage:
        print_table(table)
    for place, reason in found.spared.items():
        click.echo(f"left alone: {printable(place)}, since {printable(reason)}")
    for key in found.foreign[:_SHOWN]:
        click.echo(f"left alone: {printable(key)}, which does not belong to a run")
    if len(found.foreign) > _SHOWN:
        click.echo(f"left alone: {len(found.foreign) - _SHOWN} more of that kind")
