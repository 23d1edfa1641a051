"""``adapt-pruner compare``: runs side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.settings.storage import StorageSettings
from pipelines.commands.console import PATH, example, print_result_table

if TYPE_CHECKING:
    from core.runs.finding import RunFinder

_MANY_TASKS = 3  # above this the terminal shows their mean


_WHERE = (
    click.option(
        "--store",
        "stores",
        multiple=True,
        metavar="STORE",
        help=f"Where to look for runs; may be repeated.  [default: {StorageSettings().store}]",
    ),
    click.option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        show_envvar=True,
        default="",
        help="MLflow that knows registered models.",
    ),
)


def where_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where runs are looked for."""
    for option in reversed(_WHERE):
        command = option(command)
    return command


def finder_of(wanted: Sequence[str], stores: Sequence[str]) -> "RunFinder":
    """Return what finds runs: in the given stores, else in those of the places that are asked for."""
    from core.runs.finding import RunFinder, place_of

    places = tuple(dict.fromkeys(store for run in wanted if (store := place_of(run)[0])))
    return RunFinder(tuple(stores) or places or (StorageSettings().store,))


@click.command(
    epilog=example(
        "adapt-pruner compare output/store --html comparison.html",
        "adapt-pruner compare demo flap --store s3://models/pruning --against demo",
        "adapt-pruner compare models:/tiny-llama@candidate --against models:/tiny-llama@champion",
    )
)
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@where_options
@click.option("--against", metavar="RUN", help="Show differences from this run, and whether they are any.")
@click.option("--csv", "csv_file", type=PATH, help="Also write the numbers to this file.")
@click.option("--markdown", "markdown_file", type=PATH, help="Also write the table to this file.")
@click.option("--html", "html_file", type=PATH, help="Also write a page with pictures to this file.")
def compare(
    runs: tuple[str, ...],
    stores: tuple[str, ...],
    against: str | None,
    csv_file: Path | None,
    markdown_file: Path | None,
    html_file: Path | None,
    tracking_uri: str,
) -> None:
    """Set runs side by side: sizes, quality, time and speed.

    RUN is a key, a name or a base model, a setting such as prune.method=flap, a place such as
    STORE/runs/KEY, a store (all its runs), or a registered model such as models:/NAME@candidate. Without one,
    all runs of the stores are compared.
    """
    from pipelines.local.folders import check_file

    files = {"csv": csv_file, "markdown": markdown_file, "html": html_file}
    for option, path in files.items():
        if path is not None:
            check_file(f"--{option}={path}", path)

    from core.experiments.comparing import compare_runs
    from core.report.comparison import comparison_page, comparison_table

    wanted = [registered(run, tracking_uri) for run in runs]
    finder = finder_of(wanted, stores)
    chosen = finder.select(wanted)
    other = finder.one(registered(against, tracking_uri)) if against else None
    compared, reference = compare_runs(chosen, against=other)
    table = comparison_table(compared, against=reference)
    print_result_table(comparison_table(compared, against=reference, most_tasks=_MANY_TASKS))
    if csv_file is not None:
        csv_file.write_text(table.csv())
    if markdown_file is not None:
        markdown_file.write_text(table.markdown())
    if html_file is not None:
        html_file.write_text(comparison_page(compared, table, against=reference))


def registered(wanted: str, tracking_uri: str) -> str:
    """Return where the run of a registered model is, and anything else as it is."""
    if not wanted.startswith("models:/"):
        return wanted
    from core.tracking.aliases import checkpoint_of

    return checkpoint_of(wanted, tracking_uri)
