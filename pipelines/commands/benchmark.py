"""``adapt-pruner benchmark``: the speed of a checkpoint beside its base."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    from rich.table import Table

    from core.evaluation.speed.workload import Runtime
    from core.export.gguf_quantization import GgufDtype
    from core.runs.record import SpeedRecord


@click.command(
    epilog=example(
        "adapt-pruner benchmark output/demo/model --against output/demo/base",
        "adapt-pruner benchmark output/demo/model --against output/demo/base --runtime llama.cpp "
        "--gguf-dtype q8_0",
    ),
    help="Compare the speed of MODEL with that of its base.\n\n"
    f"{MODEL_HELP}. Prompts, decoding, loading and memory are measured. Both models are kept in memory and "
    "take turns, so that other load on the machine slows both down alike. A ratio above 1 favours MODEL.",
)
@click.argument("model")
@click.option("--against", required=True, metavar="MODEL", help="The model to compare with.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(["torch", "llama.cpp"]),
    help="Where to run them; may be repeated. llama.cpp needs the package xllamacpp.  [default: all]",
)
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens per prompt."
)
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens to decode.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1, 256),
    default=(1, 4),
    show_default=True,
    help="Sequences at a time; may be repeated.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Measurements of each.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: physical cores]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Number format in PyTorch; auto is that of each checkpoint.",
)
@click.option(
    "--gguf-dtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Number format in llama.cpp.",
)
@click.option("--json", "json_file", type=PATH, help="Also write the figures to this file.")
def benchmark(
    model: str,
    against: str,
    runtimes: tuple["Runtime", ...],
    gguf_dtype: "GgufDtype",
    json_file: Path | None,
    **workload: Any,
) -> None:
    """Measure speed side by side."""
    prepare_for(model)
    prepare_for(against, name="--against")
    if json_file is not None:
        from pipelines.local.folders import check_file

        check_file(f"--json={json_file}", json_file)

    from core.evaluation.speed.workload import Workload
    from core.model.build import pick_device
    from core.steps.speed import compare_speed

    with log_on_stderr(), local_checkpoint(against) as base, local_checkpoint(model) as checkpoint:
        params = (params_of(base), params_of(checkpoint))
        records = compare_speed(
            base,
            checkpoint,
            Workload(**workload),
            runtimes=runtimes,
            gguf_dtype=gguf_dtype,
            device=pick_device().type,
        )
    for record in records:
        print_table(speed_table(record, params))
    if json_file is not None:
        data = {"params": params, "workload": workload, "speed": [record.to_dict() for record in records]}
        json_file.write_text(json.dumps(data, indent=1))


def params_of(directory: Path) -> int:
    """Return the parameters of a checkpoint, from its config alone."""
    from core.model.build import model_shape
    from core.model.checkpoint import Checkpoint

    return model_shape(Checkpoint(directory).config).num_params()


def speed_table(record: "SpeedRecord", params: tuple[int, int]) -> "Table":
    """Return the figures of one runtime; ``params`` are those of the base and of the checkpoint."""
    from rich.table import Table

    from core.report.report import speed_rows

    table = Table(title=f"{record.runtime} on {record.device}", title_justify="left")
    for header in ("", "base", "checkpoint", "ratio"):
        table.add_column(header, justify="right" if header else "left")
    table.add_row("parameters", *(f"{count:,}" for count in params), f"{params[0] / params[1]:.2f}")
    for row in speed_rows(record):
        table.add_row(*row)
    return table
