"""``adapt-pruner report``: the report of a run, made anew."""

from pathlib import Path

import click

from core.errors import StorageError
from pipelines.commands.compare import finder_of, registered, where_options
from pipelines.commands.console import PATH, example


@click.command(
    epilog=example(
        "adapt-pruner report output/store/runs/3f9ac1d27be0 -o report.html",
        "adapt-pruner report demo --against 3f9ac1 --store s3://models/pruning -o report.html",
    )
)
@click.argument("run")
@where_options
@click.option("--against", metavar="RUN", help="Also compare with this run: figures, significance, widths.")
@click.option("-o", "--output", type=PATH, default=Path("report.html"), show_default=True)
def report(run: str, stores: tuple[str, ...], against: str | None, output: Path, tracking_uri: str) -> None:
    """Write the report of RUN, done or not.

    RUN is a key, a name, a base model, a setting, a place or a registered model, as in the command compare.
    """
    from pipelines.local.folders import check_file

    check_file(f"--output={output}", output)

    from core.experiments.comparing import compare_runs
    from core.report.comparison import comparison_parts, comparison_table
    from core.report.report import build_report

    wanted = registered(run, tracking_uri)
    finder = finder_of([wanted], stores)
    found = finder.one(wanted)
    record = found.record()
    if record is None:
        raise StorageError(f"{wanted}: its run.json is damaged. Start the run again with its recipe.")
    compared = None
    if against:
        runs, other = compare_runs([found], against=finder.one(registered(against, tracking_uri)))
        compared = comparison_parts(runs, comparison_table(runs, against=other), against=other)
    output.write_text(build_report(record, compared=compared))
    click.echo(f"{output}: {found.state}")
