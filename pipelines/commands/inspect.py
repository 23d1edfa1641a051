"""``adapt-pruner inspect``: the sizes of a checkpoint's layers."""

import click

from pipelines.commands.console import MODEL_HELP, example, local_checkpoint, prepare_for, print_table


@click.command(
    epilog=example("adapt-pruner inspect output/demo/model"),
    help="Show the sizes and parameters of every layer of MODEL.\n\n"
    f"{MODEL_HELP}. Only its config.json is read; a folder published by a run is verified whole.",
)
@click.argument("model")
def inspect(model: str) -> None:
    """Show the sizes of every layer."""
    prepare_for(model)

    from rich.table import Table

    from core.model.build import model_shape
    from core.model.checkpoint import Checkpoint
    from core.storage.publication import published_in

    with local_checkpoint(model, only=("config.json",)) as directory:
        shape = model_shape(Checkpoint(directory).config)
        published = published_in(directory)
    table = Table()
    for header in ("layer", "query heads", "KV heads", "MLP width", "parameters"):
        table.add_column(header, justify="right")
    for index, layer in enumerate(shape.layers):
        sizes = (layer.query_heads, layer.kv_heads, layer.mlp_width)
        table.add_row(str(index), *map(str, sizes), f"{shape.layer_num_params(layer):,}")
    table.add_section()
    table.add_row("outside", "", "", "", f"{shape.outside_params:,}")
    table.add_row("total", "", "", "", f"{shape.num_params():,}", style="bold")
    print_table(table)
    if published is not None:
        manifest = published.manifest
        click.echo(
            f"{len(manifest.files)} files, {manifest.total_bytes / 1e6:,.1f} MB: verified against the "
            "manifest (sha256)"
        )
