"""``adapt-pruner run``: a recipe on this machine."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.commands.console import PATH, example, set_option

if TYPE_CHECKING:
    from core.runs.record import RunRecord


@click.command(
    epilog=example(
        "adapt-pruner run recipes/demo.yaml", "adapt-pruner run recipes/demo.yaml --set prune.target=80%"
    )
)
@click.argument("recipe", type=PATH)
@set_option
@click.option(
    "--output", type=PATH, help="Folder for the report and the log.  [default: output/<recipe name>]"
)
def run(recipe: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Run RECIPE on this machine.

    All settings are checked first. If the run is interrupted or fails, the same command resumes it: no
    finished step is computed twice.
    """
    from core.settings.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    output = output or Path("output") / recipe.stem

    from rich.console import Console

    from core.quantities import seconds_text
    from core.report.report import phase_table
    from pipelines.local.run import run_local

    finished = run_local(settings, output, Console(stderr=True, highlight=False))
    record, console = finished.record, Console(highlight=False)
    console.print(phase_table(record))
    if finished.was_done:
        console.print(f"All steps were already done: nothing computed ({seconds_text(finished.seconds)}).")
    else:
        before = f"; {finished.found_done} steps were already done" if finished.found_done else ""
        console.print(f"Done in {seconds_text(finished.seconds)}{before}.")
    for speed in record.speed:
        decoding = speed.speedups.get("decode 1")
        if decoding is not None:
            console.print(f"Decodes {decoding:.2f}x as fast as the dense model ({speed.runtime}).")
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
    yield "try it", f'adapt-pruner generate {shlex.quote(checkpoint)} "What is the capital of France?"'
