"""``adapt-pruner experiment``: the runs of a table or figure, the paper's or your own, and what they make."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.errors import AdaptPrunerError, SettingsError, StorageError
from pipelines.commands.access import access_options, show_hints
from pipelines.commands.console import (
    PATH,
    example,
    local_checkpoint,
    print_result_table,
    printable,
    refuse_without,
    set_option,
)
from pipelines.commands.submit import pause_of

if TYPE_CHECKING:
    from core.experiments.collecting import Found
    from core.experiments.definition import Experiment


class ExperimentError(AdaptPrunerError):
    """Some runs of an experiment have failed."""


@click.command(
    epilog=example(
        "adapt-pruner experiment table1-smollm2",
        "adapt-pruner experiment table1 --base meta-llama/Llama-3.2-1B --seeds 1",
        "adapt-pruner experiment table1 --submit --parallel 4 --host https://kubeflow.example.org/pipeline "
        "--set storage.store=s3://models/table1",
    )
)
@click.argument("experiment", required=False)
@set_option
@click.option("--base", help="Base model instead of the experiment's; short for --set model.base=...")
@click.option("--seeds", type=click.IntRange(min=1), help="Seeds a row.  [default: the experiment's number]")
@click.option("--only", multiple=True, metavar="AXIS=LABEL", help="Only these rows; may be repeated.")
@click.option("--output", type=PATH, help="Folder for the table.  [default: output/experiments/<name>]")
@click.option("--collect", is_flag=True, help="Run nothing: make the table of what is in the store.")
@click.option("--submit", is_flag=True, help="Run on Kubeflow Pipelines instead of this machine.")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="With --submit: most runs that have not ended at a time.",
)
@click.option("--every", default="10s", show_default=True, help="With --submit: polling interval.")
@click.option("--service-account", default="", help="With --submit: Kubernetes service account of the pods.")
@access_options
def experiment(
    experiment: str | None,
    overrides: tuple[str, ...],
    base: str | None,
    seeds: int | None,
    only: tuple[str, ...],
    output: Path | None,
    collect: bool,
    submit: bool,
    parallel: int,
    every: str,
    service_account: str,
    **access: Any,
) -> None:
    """Run EXPERIMENT, and make its table and its picture.

    EXPERIMENT is a name or a YAML file; without one, the names are listed. Its runs differ in a few settings
    each: methods, sizes, seeds. Repeat the command to go on after an interruption; what is done is not
    computed again, and runs that --submit has started are found.
    """
    from core.experiments.definition import find_experiment, load_experiment, shipped_experiments

    if experiment is None:
        for name, title in shipped_experiments().items():
            click.echo(f"{name:<24} {title}")
        return
    if collect and submit:
        raise SettingsError(["--collect and --submit are both given. Leave one out."])
    refuse_without("--submit", submit, ("parallel", "every", "service_account", *access))
    bases = (f"model.base={base}",) if base else ()
    loaded = load_experiment(find_experiment(experiment), (*overrides, *bases), seeds=seeds, only=only)
    output = output or Path("output/experiments") / loaded.name
    failed: dict[str, str] = {}

    from core.experiments.collecting import found_runs, table_of
    from pipelines.local.folders import check_folders

    check_folders({f"--output={output}": output})
    if submit:
        failed = _submitted(loaded, parallel, pause_of(every), service_account, access)
    try:
        if submit or collect:
            found = found_runs(loaded.cells)
        else:
            found, failed = _run_here(loaded, output)
        table = table_of(loaded, found, output, failed)
        files = table.write(output)
        print_result_table(table)
        click.echo(f"written      {output}: {', '.join(files)}")
    except StorageError as error:
        if not submit:
            raise
        click.echo(f"hint: no table: {error} Use --collect where the store can be read.", err=True)
    if failed:
        raise ExperimentError(
            f"{len(failed)} of {len(loaded.cells)} runs have failed, as said above. Repeat the command to "
            "try them again."
        )


def _run_here(loaded: "Experiment", output: Path) -> "tuple[dict[str, Found], dict[str, str]]":
    from components.runtime import quiet_libraries

    quiet_libraries()

    from rich.console import Console

    from pipelines.local.experiment import run_cells

    found, failed = run_cells(loaded, output, Console(stderr=True, highlight=False))
    if loaded.sensitivity:
        _study_layers(loaded, found, output)
    return found, failed


def _study_layers(loaded: "Experiment", found: "dict[str, Found]", output: Path) -> None:
    """Prune each layer of each result, and of the base model, alone."""
    from core.experiments.collecting import done_runs
    from core.experiments.layers import layer_studies
    from core.steps.sensitivity import Study

    assert loaded.sensitivity is not None
    dense, results = layer_studies(loaded, done_runs(found), output)
    for study in (*dense, *results):
        if study.file.is_file():
            continue
        click.echo(f"single layers of {study.uri}", err=True)
        asked = Study(
            model=study.uri,
            sparsity=loaded.sensitivity.sparsity,
            part=loaded.sensitivity.part,
            settings=study.settings,
            text=None,
            sequences=None,
        )
        with local_checkpoint(study.uri) as directory:
            result = asked.run(directory)
        study.folder.mkdir(exist_ok=True)
        asked.write(result, study.folder)


def _submitted(
    loaded: "Experiment", parallel: int, poll_s: float, service_account: str, access: dict[str, Any]
) -> dict[str, str]:
    from core.experiments.collecting import found_runs
    from pipelines.remote.client import connect
    from pipelines.remote.fan_out import fan_out, submissions_of
    from pipelines.remote.submission import planned

    submissions, failed = submissions_of(loaded.name, loaded.cells, service_account)
    for cell in loaded.cells:
        if cell.key in failed:
            click.echo(f"{cell.name}: {failed[cell.key]}", err=True)
    settings = loaded.cells[0].settings
    show_hints(settings, planned(settings)[1])
    client = connect(**access)
    done: set[str] | None = None
    try:
        done = {key for key, found in found_runs(loaded.cells).items() if found.record is not None}
        click.echo(f"{len(loaded.cells)} runs, of which {len(done)} are done", err=True)
    except StorageError as error:
        click.echo(f"hint: what is done is not known here: {error}", err=True)
    left = [cell for cell in loaded.cells if cell.key in submissions and cell.key not in (done or ())]
    try:
        return failed | fan_out(
            client,
            left,
            submissions,
            experiment=loaded.name,
            parallel=parallel,
            poll_s=poll_s,
            trust_runs=done is None,
            say=lambda line: click.echo(printable(line), err=True),
        )
    except KeyboardInterrupt:
        click.echo("error: interrupted; the runs continue, and the same command follows them.", err=True)
        click.get_current_context().exit(130)
