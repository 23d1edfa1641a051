"""``adapt-pruner evaluate``: perplexity and benchmarks of a checkpoint."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from rich.table import Table

    from core.settings.evaluation import EvaluationSettings


@click.command(
    epilog=example(
        "adapt-pruner evaluate output/demo/model --recipe recipes/demo.yaml",
        "adapt-pruner evaluate output/demo/model --task arc_easy --task piqa --limit 200",
    ),
    help="Measure the perplexity of MODEL and its accuracy on benchmarks.\n\n"
    f"{MODEL_HELP}. The evaluation section of a recipe says what to measure; options override it.",
)
@click.argument("model")
@click.option("--recipe", type=PATH, help="Take the evaluation section of this recipe.")
@click.option(
    "--task", "tasks", multiple=True, metavar="NAME", help="lm-eval task, such as piqa; may be repeated."
)
@click.option("--limit", type=click.IntRange(0), help="Items per task; 0 takes all.")
@click.option("--text", metavar="PATH", help="Text for perplexity: a file, a package: path or a data set id.")
@click.option(
    "--batch-size",
    type=click.IntRange(0),
    help="Sequences per forward pass; 0 takes all that fit.",
)
def evaluate(
    model: str,
    recipe: Path | None,
    tasks: tuple[str, ...],
    limit: int | None,
    text: str | None,
    batch_size: int | None,
) -> None:
    """Measure a checkpoint."""
    prepare_for(model)

    from core.settings.evaluation import EvaluationSettings
    from core.settings.recipe import load_recipe
    from core.settings.texts import TextSource

    settings = load_recipe(recipe).evaluation if recipe else EvaluationSettings()
    chosen: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "tasks": tasks or None}
    if tasks:
        chosen["task_data"] = {name: path for name, path in settings.task_data.items() if name in tasks}
    if text:
        chosen["perplexity"] = TextSource(path=text)
    settings = dataclasses.replace(
        settings, **{name: value for name, value in chosen.items() if value is not None}
    )
    if not settings.tasks and settings.perplexity is None:
        raise SettingsError(
            ["nothing to evaluate. Give --task, --text, or a --recipe with an evaluation section."]
        )
    from core.steps.footprint import explaining_memory

    with (
        log_on_stderr(),
        local_checkpoint(model) as directory,
        explaining_memory("evaluation.batch_size=0 or lower"),
    ):
        print_table(evaluation_table(directory, settings))


def evaluation_table(directory: Path, settings: "EvaluationSettings") -> "Table":
    """Measure a checkpoint as a run measures its phases, and return the figures."""
    from rich.table import Table
    from safetensors.torch import load_file

    from core.data.samples import write_perplexity_windows
    from core.evaluation.benchmarks import evaluate_tasks
    from core.evaluation.perplexity import perplexity
    from core.machine.precision import choose_precision, resolved, warn_if_emulated
    from core.model.build import dtype_of, load_model, load_tokenizer, pick_device
    from core.model.checkpoint import Checkpoint
    from core.runs.record import perplexity_text
    from core.scratch import scratch_folder
    from core.steps.footprint import planned_evaluation

    device = pick_device()
    settings = resolved(settings, lambda: choose_precision(device))
    warn_if_emulated("evaluation", settings.precision, device)
    checkpoint = Checkpoint(directory)
    settings = planned_evaluation(checkpoint.config, settings, device.type)
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
