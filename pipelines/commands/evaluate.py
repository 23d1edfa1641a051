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

    from core.evaluation.cache import AnswerCache
    from core.settings.evaluation import EvaluationSettings


@click.command(
    epilog=example(
        "adapt-pruner evaluate output/demo/model --recipe recipes/demo.yaml",
        "adapt-pruner evaluate output/demo/model --task piqa --limit 200 --cache output/demo/store",
    ),
    help="Measure the perplexity of MODEL and its accuracy on benchmarks.\n\n"
    f"{MODEL_HELP}. The evaluation section of a recipe says what to measure; options override it.",
)
@click.argument("model")
@click.option("--recipe", type=PATH, help="Take the evaluation section of this recipe.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="lm-eval task such as piqa, or a preset: commonsense, llm, mini; may be repeated.",
)
@click.option("--limit", type=click.IntRange(0), help="Items per task; 0 takes all.")
@click.option("--text", metavar="PATH", help="Text for perplexity: a file, a package: path or a data set id.")
@click.option(
    "--batch-size",
    type=click.IntRange(0),
    help="Sequences per forward pass; 0 takes all that fit.",
)
@click.option(
    "--cache",
    metavar="STORE",
    help="Keep what is answered in this store, task by task, and ask nothing that it has; the storage.store "
    "of a run has the answers of its checkpoints.  [default: nothing is kept]",
)
def evaluate(
    model: str,
    recipe: Path | None,
    tasks: tuple[str, ...],
    limit: int | None,
    text: str | None,
    batch_size: int | None,
    cache: str | None,
) -> None:
    """Measure a checkpoint."""
    prepare_for(model)

    from core.settings.evaluation import EvaluationSettings, members_of
    from core.settings.recipe import load_recipe
    from core.settings.texts import TextSource

    recipe_settings = load_recipe(recipe) if recipe else None
    settings = recipe_settings.evaluation if recipe_settings else EvaluationSettings()
    seed = recipe_settings.seed if recipe_settings else 0
    chosen: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "tasks": tasks or None}
    if tasks:
        names = [name for task in tasks for name in (task, *members_of(task))]
        chosen["task_data"] = {name: path for name, path in settings.task_data.items() if name in names}
        chosen["shots"] = {name: number for name, number in settings.shots.items() if name in names}
    if text:
        chosen["perplexity"] = TextSource(path=text)
    settings = dataclasses.replace(
        settings, **{name: value for name, value in chosen.items() if value is not None}
    )
    if not settings.tasks and settings.perplexity is None:
        raise SettingsError(
            ["nothing to evaluate. Give --task, --text, or a --recipe with an evaluation section."]
        )
    from core.evaluation.cache import AnswerCache, files_digest, folder_digest
    from core.steps.footprint import explaining_memory
    from core.storage.publication import open_publication
    from core.storage.store import open_store
    from pipelines.local.folders import check_folders

    if cache and (folder := open_store(cache).local_path("")) is not None:
        check_folders({f"--cache={cache}": folder})
    with (
        log_on_stderr(),
        local_checkpoint(model) as directory,
        explaining_memory("evaluation.batch_size=0 or lower"),
    ):
        settings = settled(directory, settings)
        answers = None
        if cache:
            if "://" in model:
                digest = files_digest(open_publication(model).manifest.files)
            else:
                digest = folder_digest(directory)
            answers = AnswerCache(store=cache, checkpoint=digest, precision=settings.precision)
        print_table(evaluation_table(directory, settings, seed=seed, cache=answers))


def settled(directory: Path, settings: "EvaluationSettings") -> "EvaluationSettings":
    """Return the settings with the number format and the batch size that they come to on this machine."""
    from core.machine.precision import choose_precision, resolved, warn_if_emulated
    from core.model.build import pick_device
    from core.model.checkpoint import Checkpoint
    from core.steps.footprint import planned_evaluation

    device = pick_device()
    settings = resolved(settings, lambda: choose_precision(device))
    warn_if_emulated("evaluation", settings.precision, device)
    return planned_evaluation(Checkpoint(directory).config, settings, device.type)


def evaluation_table(
    directory: Path, settings: "EvaluationSettings", *, seed: int, cache: "AnswerCache | None" = None
) -> "Table":
    """Measure a checkpoint as a run of this seed measures its phases, and return the figures."""
    from rich.table import Table

    from core.data.samples import write_perplexity_windows
    from core.evaluation.checkpoint import LoadedOnce, measure_checkpoint
    from core.evaluation.perplexity import measure_text
    from core.model.build import load_tokenizer, model_shape
    from core.model.checkpoint import Checkpoint
    from core.runs.record import perplexity_text
    from core.scratch import scratch_folder

    checkpoint = Checkpoint(directory)
    load = LoadedOnce(directory, settings.precision)
    table = Table("measure", "metric")
    table.add_column("value", justify="right")
    table.add_row("parameters", "", f"{model_shape(checkpoint.config).num_params():,}")
    if settings.perplexity is not None:
        with scratch_folder() as scratch:
            path = scratch / "windows.safetensors"
            write_perplexity_windows(
                settings.perplexity,
                load_tokenizer(checkpoint),
                windows=settings.perplexity_windows,
                length=settings.perplexity_length,
                stride=settings.perplexity_stride,
                path=path,
            )
            text = measure_text(lambda: load()[0], path, batch_size=settings.batch_size, cache=cache)
        value = text.metrics["perplexity"].over_all()
        table.add_row(settings.perplexity.path, "perplexity", perplexity_text(value))
    found = measure_checkpoint(directory, settings, seed=seed, cache=cache, model=load)
    for task, metrics in found.figures.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4g}")
    return table
