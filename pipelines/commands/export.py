"""``adapt-pruner export``: a checkpoint in another runtime's format."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.errors import SettingsError
from core.redaction import one_line
from pipelines.commands.console import (
    MODEL_HELP,
    PATH,
    example,
    local_checkpoint,
    log_on_stderr,
    prepare_for,
)

if TYPE_CHECKING:
    from core.export.exported import Exported
    from core.export.gguf_quantization import GgufDtype


@click.command(
    epilog=example(
        "adapt-pruner export output/demo/model model.gguf --format gguf --dtype q8_0",
        "adapt-pruner export output/demo/model padded --format padded",
    ),
    help="Write MODEL to OUTPUT in another runtime's format.\n\n"
    f"{MODEL_HELP}. It is left unchanged. OUTPUT must not exist yet.\n\n"
    "\b\n"
    "gguf    one file for llama.cpp and its relatives; Llama, Qwen2 and tied Qwen3\n"
    "onnx    a folder for ONNX Runtime and its GenAI: one step of generation, in float32\n"
    "decilm  a folder for vLLM, SGLang, TensorRT-LLM and MLX; Llama pruned with\n"
    "        prune.profile=portable\n"
    "padded  a folder that any runtime loads: zeros make all layers as large as the largest,\n"
    "        so the replies are those of MODEL, at the memory and speed of a larger model",
)
@click.argument("model")
@click.argument("output", type=PATH)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["gguf", "onnx", "decilm", "padded"]),
    required=True,
    help="The format, see above.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Number format of the weights; gguf only.  [default: f16]",
)
def export(model: str, output: Path, format_: str, dtype: "GgufDtype | None") -> None:
    """Write a checkpoint in another format."""
    if dtype is not None and format_ != "gguf":
        raise SettingsError([f"--dtype={dtype} is for --format=gguf, not {format_}. Leave it out."])
    prepare_for(model)

    from core.export.exported import check_absent
    from pipelines.local.folders import check_folders

    check_absent(output)
    check_folders({f"OUTPUT={output}": output.parent})
    with log_on_stderr(), local_checkpoint(model) as directory:
        exported = _export(directory, output, format_, dtype or "f16")
    click.echo(f"{exported.path}: {exported.params:,} parameters, {exported.size_bytes / 1e6:,.0f} MB")
    for note in exported.notes:
        click.echo(f"note: {one_line(note)}")


def _export(directory: Path, output: Path, format_: str, dtype: "GgufDtype") -> "Exported":
    if format_ == "gguf":
        from core.export.gguf import export_gguf

        return export_gguf(directory, output, dtype=dtype)
    if format_ == "onnx":
        from core.export.onnx import export_onnx

        return export_onnx(directory, output)
    if format_ == "decilm":
        from core.export.decilm import export_decilm

        return export_decilm(directory, output)
    from core.export.padded import export_padded

    return export_padded(directory, output)
