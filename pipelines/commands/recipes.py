"""Commands that take a recipe: run it here, or compile it for a cluster."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.errors import SettingsError
from pipelines.commands.console import example

if TYPE_CHECKING:
    from core.runs.record import RunRecord
    from pipelines.local.run import LocalRun

_OVERRIDES = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, such as prune.target=80%.",
)


@click.command(
    epilog=example(
        "adapt-pruner run recipes/demo.yaml", "adapt-pruner run recipes/demo.yaml --set prune.target=80%"
    )
)
@click.argument("recipe", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the report and the log.  [default: output/<recipe name>]",
)
def run(recipe: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Run RECIPE on this machine.

    Checks all settings first. A run that was interrupted or failed goes on where it stopped when the same
    command is given again; nothing is computed twice.
    """
    from core.settings.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    output = output or Path("output") / recipe.stem

    from rich.console import Console

    from pipelines.local.run import run_local

    finished = run_local(settings, output, Console(stderr=True, highlight=False))
    _show_result(finished, output)


def _show_result(finished: "LocalRun", output: Path) -> None:
    from rich.console import Console

    from core.report.report import phase_table
    from core.runs.record import seconds_text

    record = finished.record
    console = Console(highlight=False)
    console.print(phase_table(record))
    if finished.was_done:
        console.print(f"Every step was done before: nothing was computed ({seconds_text(finished.seconds)}).")
    else:
        before = f", {finished.found_done} steps were done before" if finished.found_done else ""
        console.print(f"Done in {seconds_text(finished.seconds)}{before}.")
    for speed in record.speed:
        decoding = speed.speedups.get("decode 1")
        if decoding is not None:
            console.print(f"{decoding:.2f} times as fast as the dense model at writing ({speed.runtime}).")
    for name, value in _where_to_look(record, output):
        console.print(f"{name:<12} {value}", soft_wrap=True, markup=False)


def _where_to_look(record: "RunRecord", output: Path) -> Iterator[tuple[str, str]]:
    link = output / "model"
    checkpoint = str(link) if link.is_symlink() else record.checkpoint_uri
    yield "report", str(output / "report.html")
    yield "checkpoint", checkpoint
    if record.tracking_uri.startswith("sqlite:"):
        yield "MLflow", f"mlflow ui --backend-store-uri {shlex.quote(record.tracking_uri)}"
    elif record.tracking_uri:
        yield "MLflow", record.tracking_uri
    yield "talk to it", f'adapt-pruner generate {shlex.quote(checkpoint)} "What is the capital of France?"'


@click.command(name="compile", epilog=example("adapt-pruner compile recipes/demo.yaml -o pipeline.yaml"))
@click.argument("recipe", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The YAML file to write.",
)
def compile_(recipe: Path, overrides: tuple[str, ...], output: Path) -> None:
    """Compile RECIPE into a pipeline for Kubeflow Pipelines.

    Upload the file in the KFP UI. Fixed in it are prune.phases, prune.steps_per_phase, evaluation.speed and
    the section cluster; the other settings are its parameters' defaults and can be changed for each run.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise SettingsError([f"--output={output} must end in .yaml. Rename it."])
    from core.settings.recipe import load_recipe

    settings = load_recipe(recipe, overrides)

    from pipelines.adapt_accel import compile_pipeline

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        compile_pipeline(settings, output)
    except OSError as error:
        raise SettingsError(
            [f"--output={output} cannot be written ({error.strerror}). Name another file."]
        ) from None
    from pipelines.remote.submission import hints, out_of_reach

    for hint in (*out_of_reach(settings), *hints(settings)):
        click.echo(f"hint: {hint}", err=True)
    size = output.stat().st_size
    click.echo(f"{output}: {settings.prune.phases} phases, {size:,} bytes")
