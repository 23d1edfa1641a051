"""``adapt-pruner compile``: a recipe as a pipeline for Kubeflow Pipelines."""

from pathlib import Path

import click

from core.errors import SettingsError
from pipelines.commands.console import PATH, example, set_option


@click.command(name="compile", epilog=example("adapt-pruner compile recipes/demo.yaml -o pipeline.yaml"))
@click.argument("recipe", type=PATH)
@set_option
@click.option("-o", "--output", required=True, type=PATH, help="The YAML file to write.")
def compile_(recipe: Path, overrides: tuple[str, ...], output: Path) -> None:
    """Compile RECIPE into a pipeline for Kubeflow Pipelines.

    Upload the file in the KFP UI. Fixed in it are prune.phases, prune.steps_per_phase, prune.widths,
    prune.hidden_size, prune.repair, prune.distill_steps, training.nodes, evaluation.speed and the section
    cluster; all other settings can be changed for each run, prune.method as far as the tasks that get
    accelerators are the same.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise SettingsError([f"--output={output} must end in .yaml. Rename it."])
    from core.settings.recipe import load_recipe

    settings = load_recipe(recipe, overrides)

    from pipelines.adapt_accel import compile_pipeline
    from pipelines.commands.access import show_hints
    from pipelines.remote.submission import out_of_reach, planned

    settings, needs = planned(settings)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        compile_pipeline(settings, output)
    except OSError as error:
        raise SettingsError(
            [f"--output={output} cannot be written ({error.strerror}). Name another file."]
        ) from None
    for hint in out_of_reach(settings):
        click.echo(f"hint: {hint}", err=True)
    show_hints(settings, needs)
    click.echo(f"{output}: {settings.prune.phases} phases, {output.stat().st_size:,} bytes")
