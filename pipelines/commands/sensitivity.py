"""``adapt-pruner sensitivity``: how much the loss grows when one layer alone is pruned."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.errors import SettingsError
from pipelines.commands.console import (
    MODEL_HELP,
    PATH,
    example,
    local_checkpoint,
    log_on_stderr,
    prepare_for,
    print_table,
)

if TYPE_CHECKING:
    from core.pruning.sensitivity import Part


@click.command(
    epilog=example(
        "adapt-pruner sensitivity output/demo/model --text held-out.txt",
        "adapt-pruner sensitivity output/demo/model --recipe recipes/demo.yaml --sparsity 0.3 --part mlp",
    ),
    help="Show how much the loss grows when one layer of MODEL is pruned.\n\n"
    f"{MODEL_HELP}. It is left unchanged. Each layer is pruned alone: the groups with the lowest scores on a "
    "calibration text are removed, and the loss is measured on another text. A recipe names both texts and "
    "how groups are scored; without one, the first half of --text is for calibration. The losses need memory "
    "for the whole model.",
)
@click.argument("model")
@click.option(
    "--sparsity",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the layer's MLP channels and attention groups to remove, in whole groups.",
)
@click.option(
    "--part",
    type=click.Choice(["both", "mlp", "attention"]),
    default="both",
    show_default=True,
    help="Where the layer is pruned.",
)
@click.option("--recipe", type=PATH, help="Take texts and sizes from this recipe; windows never slide.")
@click.option("--text", metavar="PATH", help="Text to measure on: a file, a package: path or a data set id.")
@click.option(
    "--sequences",
    type=click.IntRange(1),
    help="Sequences for calibration, and as many to measure on.  [default: the recipe's, else 16]",
)
@click.option(
    "--output",
    type=PATH,
    default=Path("output/sensitivity"),
    show_default=True,
    help="Folder for sensitivity.html and sensitivity.json.",
)
def sensitivity(
    model: str,
    sparsity: float,
    part: "Part",
    recipe: Path | None,
    text: str | None,
    sequences: int | None,
    output: Path,
) -> None:
    """Study which layers matter."""
    if not 0 < sparsity < 1:
        raise SettingsError(
            [f"--sparsity={sparsity:g} must lie between 0 and 1. Give the share of each layer to remove."]
        )
    prepare_for(model)

    from core.settings.recipe import load_recipe
    from pipelines.local.folders import check_folders

    settings = load_recipe(recipe) if recipe else None
    if text is None and (settings is None or settings.evaluation.perplexity is None):
        raise SettingsError(
            ["no text to measure on. Give --text, or a --recipe whose evaluation section has perplexity."]
        )
    check_folders({f"--output={output}": output})

    from rich.table import Table

    from core.steps.sensitivity import Study

    study = Study(
        model=model, sparsity=sparsity, part=part, settings=settings, text=text, sequences=sequences
    )
    with log_on_stderr(), local_checkpoint(model) as directory:
        result = study.run(directory)
    study.write(result, output)
    header, *rows = study.rows(result)
    table = Table(title=study.what(), caption=study.correlation(result))
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    print_table(table)
    click.echo(f"picture      {output / 'sensitivity.html'}")
    click.echo(f"numbers      {output / 'sensitivity.json'}")
