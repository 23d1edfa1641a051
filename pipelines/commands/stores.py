"""Commands that look into a store: its runs, and what may go."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.errors import SettingsError
from pipelines.commands.console import example, log_on_stderr

if TYPE_CHECKING:
    from rich.table import Table

    from core.runs.overview import RunOverview
    from core.storage.garbage import Findings
    from core.storage.interface import Store

_STORE_HELP = "STORE is what a recipe's storage.store names: a folder or an s3:// address"
_SHOWN = 10


@click.command(
    epilog=example("adapt-pruner runs output/store", "adapt-pruner runs s3://models/pruning --json"),
    help=f"Show the runs in STORE: how far each has come, who works on it, its size.\n\n{_STORE_HELP}.",
)
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
def runs(store: str, as_json: bool) -> None:
    """Show the runs in a store."""
    opened = _open(store)

    from core.runs.overview import list_runs

    found = list_runs(opened)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(run) for run in found], indent=1))
    elif not found:
        click.echo(f"{opened.uri} holds no run.")
    else:
        _print(_runs_table(found))


@click.command(
    epilog=example("adapt-pruner clean output/store"),
    help="Remove from STORE what belongs to nothing any more: what killed publishers and interrupted uploads "
    "have left, training states of phases that are published, leases and job files of ended runs.\n\n"
    "Lists it and asks first. Runs that somebody works on are spared, and so is all that an interrupted run "
    f"needs to go on. {_STORE_HELP}.",
)
@click.argument("store")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(store: str, yes: bool) -> None:
    """Remove from a store what belongs to nothing any more."""
    opened = _open(store)

    from core.runs.record import bytes_text
    from core.storage.garbage import clean as remove_garbage
    from core.storage.garbage import find_garbage
    from core.storage.owner import Owner

    with log_on_stderr():
        found = find_garbage(opened)
        _show_findings(found)
        files = [file for piece in found.garbage for file in piece.files]
        if not files:
            click.echo("Nothing to remove.")
            return
        click.echo(f"To remove: {len(files)} files, {bytes_text(sum(file.size for file in files))}.")
        if not yes and not sys.stdin.isatty():
            raise SettingsError(["clean asks before it removes, but this is no terminal. Give --yes."])
        if not yes and not click.confirm("Remove them?"):
            click.echo("Nothing was removed.")
            return
        removed = remove_garbage(opened, found.garbage, Owner.of(f"clean-{os.getpid()}", pid=os.getpid()))
    click.echo(f"Removed {len(removed)} files, {bytes_text(sum(file.size for file in removed))}.")


def _open(store: str) -> "Store":
    """Open a store that is there, before anything heavy is imported."""
    if "://" not in store and not Path(store).is_dir():
        raise SettingsError(
            [f"STORE={store} is not a folder. Give the folder or s3:// address that storage.store names."]
        )
    from core.storage.store import open_store

    return open_store(store)


def _print(table: "Table") -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 1000  # what reads a pipe wants a line a row
    Console(highlight=False, markup=False, width=width).print(table)


def _runs_table(found: "list[RunOverview]") -> "Table":
    from rich.table import Table

    from core.runs.record import bytes_text

    table = Table("run", "name", "base", "target", "state", "phase", "last step", box=None)
    table.add_column("size", justify="right")
    table.add_column("last active", justify="right")
    for run in found:
        phase = f"{run.phase} of {run.phases}" if run.phases else str(run.phase)
        state = f"{run.state}: {run.owner}" if run.owner else run.state
        cells = (run.key, run.name, run.base, run.target, state, phase, run.last_step or "-")
        table.add_row(*map(_printable, cells), bytes_text(run.size), _age(time.time() - run.active_s))
    return table


def _show_findings(found: "Findings") -> None:
    from rich.table import Table

    from core.runs.record import bytes_text

    table = Table("where", "what", box=None)
    table.add_column("files", justify="right")
    table.add_column("size", justify="right")
    for piece in found.garbage:
        size = bytes_text(sum(file.size for file in piece.files))
        table.add_row(_printable(piece.place), piece.reason, str(len(piece.files)), size)
    if found.garbage:
        _print(table)
    for place, reason in found.spared.items():
        click.echo(f"left alone: {_printable(place)}, since {_printable(reason)}")
    for key in found.foreign[:_SHOWN]:
        click.echo(f"left alone: {_printable(key)}, which is none of a run's files")
    if len(found.foreign) > _SHOWN:
        click.echo(f"left alone: {len(found.foreign) - _SHOWN} more of that kind")


def _printable(text: str) -> str:
    """Return text from a store without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _age(seconds: float) -> str:
    from core.runs.record import seconds_text

    days = int(seconds // 86_400)
    return f"{days} days ago" if days > 1 else f"{seconds_text(max(seconds, 0.0))} ago"
