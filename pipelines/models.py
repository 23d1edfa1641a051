"""What the commands that look at one checkpoint do: its sizes, its quality, its answers."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from transformers import TextStreamer

from core.data.mixture import write_perplexity_windows
from core.errors import CheckpointError
from core.evaluation.benchmarks import evaluate_tasks
from core.evaluation.perplexity import perplexity
from core.machine.precision import choose_precision, resolved, warn_if_emulated
from core.model.build import dtype_of, load_model, load_tokenizer, model_shape, pick_device
from core.model.checkpoint import Checkpoint
from core.report.report import speed_rows
from core.runs.record import SpeedRecord, perplexity_text
from core.scratch import scratch_folder
from core.settings.evaluation import EvaluationSettings
from core.storage.layout import CARD
from core.storage.publication import open_publication, published_in, verify_folder
from core.untrusted import foreign_errors


@contextlib.contextmanager
def local_checkpoint(model: str, *, only: Sequence[str] | None = None, verify: bool = True) -> Iterator[Path]:
    """Give the folder of a checkpoint; a published one is verified, one that is elsewhere fetched first.

    Args:
        model: A folder, which is verified whole if it is a publication, less the model card: that may have
            been edited. Or the URI of a publication.
        only: Files that are fetched of a URI; None for all.
        verify: Whether a folder is verified here.
    """
    if "://" not in model:
        yield verify_folder(Path(model), may_differ=(CARD,)) if verify else Path(model)
        return
    with scratch_folder() as scratch:
        yield open_publication(model).fetch(scratch, only=only)


def verified_text(directory: Path) -> str:
    """Return what ``local_checkpoint`` has compared of a folder; "" if it is no publication."""
    published = published_in(directory)
    if published is None:
        return ""
    manifest = published.manifest
    return f"{len(manifest.files)} files, {manifest.total_bytes / 1e6:,.1f} MB: as the manifest says (sha256)"


def layer_table(directory: Path) -> Table:
    """Return the sizes and parameters of every layer, from the checkpoint's config alone."""
    shape = model_shape(Checkpoint(directory).config)
    total = shape.num_params()
    table = Table()
    for header in ("layer", "query heads", "KV heads", "MLP width", "parameters"):
        table.add_column(header, justify="right")
    for index, layer in enumerate(shape.layers):
        sizes = (layer.query_heads, layer.kv_heads, layer.mlp_width)
        table.add_row(str(index), *map(str, sizes), f"{shape.layer_num_params(layer):,}")
    table.add_section()
    table.add_row("outside", "", "", "", f"{shape.outside_params:,}")
    table.add_row("total", "", "", "", f"{total:,}", style="bold")
    return table


def evaluation_table(directory: Path, settings: EvaluationSettings) -> Table:
    """Measure a checkpoint as a run measures its phases, and return the figures."""
    device = pick_device()
    settings = resolved(settings, lambda: choose_precision(device))
    warn_if_emulated("evaluation", settings.precision, device)
    checkpoint = Checkpoint(directory)
    model = load_model(checkpoint, dtype=dtype_of(settings.precision), device=device)
    tokenizer = load_tokenizer(checkpoint)
    table = Table("measure", "metric")
    table.add_column("value", justify="right")
    table.add_row("parameters", "", f"{sum(p.numel() for p in model.parameters()):,}")
    if settings.perplexity is not None:
        with scratch_folder() as scratch:
            path = scratch / "windows.safetensors"
            write_perplexity_windows(
                settings.perplexity,
                tokenizer,
                windows=settings.perplexity_windows,
                length=settings.perplexity_length,
                path=path,
            )
            windows = load_file(path)["input_ids"]
        value = perplexity(model, windows, batch_size=settings.batch_size)
        table.add_row(settings.perplexity.path, "perplexity", perplexity_text(value))
    for task, metrics in evaluate_tasks(model, tokenizer, settings).items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4g}")
    return table


def params_of(directory: Path) -> int:
    """Return the parameters of a checkpoint, from its config alone."""
    return model_shape(Checkpoint(directory).config).num_params()


def speed_table(record: SpeedRecord, params: tuple[int, int]) -> Table:
    """Return what was measured in one runtime as a table for a terminal.

    Args:
        record: The measurement.
        params: Parameters of the base and of the checkpoint.
    """
    table = Table(title=f"{record.runtime} on {record.device}", title_justify="left")
    table.add_column("")
    for header in ("base", "checkpoint", "ratio"):
        table.add_column(header, justify="right")
    table.add_row("parameters", *(f"{count:,}" for count in params), f"{params[0] / params[1]:.2f}")
    for row in speed_rows(record):
        table.add_row(*row)
    return table


def stream_answer(
    directory: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Print what a checkpoint answers, as it comes.

    Args:
        directory: The checkpoint.
        prompt: The user's message if there is a chat template, else the text to continue.
        max_new_tokens: Tokens at most.
        temperature: 0 takes the likeliest token.
        seed: Seed of the sampling.
    """
    device, checkpoint = pick_device(), Checkpoint(directory)
    model: Any = load_model(checkpoint, device=device)
    tokenizer = load_tokenizer(checkpoint)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature:
        sampling["temperature"] = temperature
    model.generate(
        **_prompt_tokens(tokenizer, prompt).to(device),
        max_new_tokens=max_new_tokens,
        streamer=_Printable(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )


def _prompt_tokens(tokenizer: Any, prompt: str) -> Any:
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]

    def failed(said: str) -> CheckpointError:
        return CheckpointError(f"the chat template of MODEL fails: {said}. Correct or remove it.")

    with foreign_errors(failed):
        return tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


class _Printable(TextStreamer):
    """Prints an answer without what would steer a terminal: a model may write anything."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        super().on_finalized_text(shown, stream_end)
