"""``adapt-pruner runs``: the runs of a store."""

import dataclasses
import json
import time

import click

from pipelines.commands.console import STORE_HELP, example, opened_store, print_table, printable


@click.command(
    epilog=example("adapt-pruner runs output/store", "adapt-pruner runs s3://models/pruning --json"),
    help=f"List the runs in STORE with their progress, owner and size.\n\n{STORE_HELP}.",
)
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def runs(store: str, as_json: bool) -> None:
    """List the runs in a store."""
    opened = opened_store(store)

    from rich.table import Table

    from core.quantities import bytes_text
    from core.runs.overview import list_runs

    found = list_runs(opened)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(run) for run in found], indent=1))
        return
    if not found:
        click.echo(f"{opened.uri} contains no runs.")
        return
    table = Table("run", "name", "base", "target", "state", "phase", "last step", box=None)
    table.add_column("size", justify="right")
    table.add_column("last active", justify="right")
    for run in found:
        phase = f"{run.phase} of {run.phases}" if run.phases else str(run.phase)
        state = f"{run.state}: {run.owner}" if run.owner else run.state
        cells = (run.key, run.name, run.base, run.target, state, phase, run.last_step or "-")
        table.add_row(*map(printable, cells), bytes_text(run.size), _age(time.time() - run.active_s))
    print_table(table)


def _age(seconds: float) -> str:
    from core.quantities import seconds_text

    days = int(seconds // 86_400)
    return f"{days} days ago" if days > 1 else f"{seconds_text(max(seconds, 0.0))} ago"
