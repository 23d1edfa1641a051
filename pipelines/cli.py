"""The command ``adapt-pruner``. Imports nothing heavy before it is needed: ``--help`` answers at once."""

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.errors import AdaptPrunerError, SettingsError

if TYPE_CHECKING:
    from core.pruning.sensitivity import Part
    from core.record import RunRecord
    from pipelines.local import LocalRun


class _Commands(click.Group):
    """Turns errors that are meant for the user into ``error:`` lines and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdaptPrunerError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(2 if isinstance(error, SettingsError) else 1)
        except KeyboardInterrupt:
            click.echo(
                "error: interrupted; `adapt-pruner run` resumes after the last finished step.", err=True
            )
            ctx.exit(130)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="adapt-pruner")
def main() -> None:
    """Turn a large language model into a smaller one of exactly the size you ask for.

    A recipe (a YAML file) names the model, the target size, the texts and the number of phases; each phase
    prunes a little and trains a little.

    Exit status: 0 done, 1 failed, 2 the settings are wrong.
    """


def _example(*lines: str) -> str:
    """Return an epilog that shows commands; click does not wrap lines after a backspace character."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


_OVERRIDES = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, such as prune.target=80%.",
)


@main.command(
    epilog=_example(
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
    from core.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    output = output or Path("output") / recipe.stem

    from rich.console import Console

    from pipelines.local import run_local

    finished = run_local(settings, output, Console(stderr=True, highlight=False))
    _show_result(finished, output)


def _show_result(finished: "LocalRun", output: Path) -> None:
    from rich.console import Console

    from core.record import seconds_text
    from core.tracking.report import phase_table
    from pipelines.local import fetch_results

    record = fetch_results(finished, output)
    console = Console(highlight=False)
    console.print(phase_table(record))
    if finished.was_done:
        console.print(f"Every step was done before: nothing was computed ({seconds_text(finished.seconds)}).")
    else:
        before = f", {finished.found_done} steps were done before" if finished.found_done else ""
        console.print(f"Done in {seconds_text(finished.seconds)}{before}.")
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


@main.command(name="compile", epilog=_example("adapt-pruner compile recipes/demo.yaml -o pipeline.yaml"))
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

    Upload the file in the KFP UI. The number of phases is fixed in it; the other settings are the defaults of
    its parameters and can be changed for each run.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise SettingsError([f"--output={output} must end in .yaml. Rename it."])
    from core.recipe import load_recipe

    settings = load_recipe(recipe, overrides)

    from pipelines.adapt_accel import compile_pipeline

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        compile_pipeline(settings, output)
    except OSError as error:
        raise SettingsError(
            [f"--output={output} cannot be written ({error.strerror}). Name another file."]
        ) from None
    size = output.stat().st_size
    click.echo(f"{output}: {settings.prune.phases} phases, {size:,} bytes")


_MODEL_HELP = "MODEL is a folder or an s3:// address of a Hugging Face checkpoint"


@main.command(
    epilog=_example("adapt-pruner inspect output/model"),
    help="Show the sizes and parameters of every layer of MODEL.\n\n"
    f"{_MODEL_HELP}; only its config.json is read.",
)
@click.argument("model")
def inspect(model: str) -> None:
    """Show the sizes of every layer."""
    _prepare_for(model)

    from rich import print as show

    from pipelines.models import layer_table, local_checkpoint

    with local_checkpoint(model, only=("config.json",)) as directory:
        show(layer_table(directory))


@main.command(
    epilog=_example(
        "adapt-pruner evaluate output/model --recipe recipes/demo.yaml",
        "adapt-pruner evaluate output/model --task arc_easy --task piqa --limit 200",
    ),
    help="Measure the perplexity of MODEL and its accuracy on benchmarks.\n\n"
    f"{_MODEL_HELP}. What is measured stands in the evaluation section of a recipe, or in the options, which "
    "override it.",
)
@click.argument("model")
@click.option("--recipe", type=click.Path(path_type=Path), help="Take the evaluation section of this recipe.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="An lm-eval task, such as piqa.")
@click.option("--limit", type=click.IntRange(0), help="Items a task; 0 takes all.")
@click.option("--text", metavar="PATH", help="Text for perplexity: a file, a package: path or a data set id.")
@click.option("--batch-size", type=click.IntRange(1), help="Sequences a forward pass.")
def evaluate(
    model: str,
    recipe: Path | None,
    tasks: tuple[str, ...],
    limit: int | None,
    text: str | None,
    batch_size: int | None,
) -> None:
    """Measure a checkpoint."""
    _prepare_for(model)

    from rich import print as show

    from core.config import EvaluationSettings, TextSource
    from core.recipe import load_recipe

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

    from pipelines.models import evaluation_table, local_checkpoint

    with _log_on_stderr(), local_checkpoint(model) as directory:
        show(evaluation_table(directory, settings))


@main.command(
    epilog=_example(
        "adapt-pruner sensitivity output/model --text held-out.txt",
        "adapt-pruner sensitivity output/model --recipe recipes/demo.yaml --sparsity 0.3 --part mlp",
    ),
    help="Prune each layer of MODEL alone and show how much the loss grows.\n\n"
    f"{_MODEL_HELP}. The groups that matter least to the loss on a calibration text go, and the loss is "
    "measured on another text. With a recipe its calibration and evaluation sections name the texts; with "
    "--text alone, its first half is calibrated on. MODEL stays as it is.",
)
@click.argument("model")
@click.option(
    "--sparsity",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the layer's MLP channels and attention groups that goes; only whole ones go.",
)
@click.option(
    "--part",
    type=click.Choice(["both", "mlp", "attention"]),
    default="both",
    show_default=True,
    help="What the layer loses.",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="Take texts and sizes from this recipe.")
@click.option("--text", metavar="PATH", help="Measure on this: a file, a package: path or a data set id.")
@click.option(
    "--sequences",
    type=click.IntRange(1),
    help="Sequences to calibrate on, and as many to measure on.  [default: the recipe's, else 16]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("output/sensitivity"),
    show_default=True,
    help="Folder for the picture (sensitivity.html) and the numbers (sensitivity.json).",
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
            [f"--sparsity={sparsity:g} must lie between 0 and 1. Give the share of each layer that goes."]
        )
    _prepare_for(model)

    from core.recipe import load_recipe
    from pipelines.folders import check_folders

    settings = load_recipe(recipe) if recipe else None
    if text is None and (settings is None or settings.evaluation.perplexity is None):
        raise SettingsError(
            ["no text to measure on. Give --text, or a --recipe whose evaluation section has perplexity."]
        )
    check_folders({f"--output={output}": output})

    from rich.console import Console

    from pipelines.models import local_checkpoint
    from pipelines.sensitivity import Study

    study = Study(
        model=model, sparsity=sparsity, part=part, settings=settings, text=text, sequences=sequences
    )
    with _log_on_stderr(), local_checkpoint(model) as directory:
        result = study.run(directory)
    study.write(result, output)
    console = Console(highlight=False)
    console.print(study.table(result))
    console.print(f"picture      {output / 'sensitivity.html'}", soft_wrap=True, markup=False)
    console.print(f"numbers      {output / 'sensitivity.json'}", soft_wrap=True, markup=False)


@main.command(
    epilog=_example('adapt-pruner generate output/model "What is the capital of France?"'),
    help="Let MODEL answer PROMPT.\n\n"
    f"{_MODEL_HELP}. A model with a chat template gets the prompt as the user's message, any other continues "
    "the text.",
)
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 always takes the likeliest token; higher is more varied.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
def generate(model: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Talk to a checkpoint."""
    _prepare_for(model)

    from pipelines.models import local_checkpoint, stream_answer

    with local_checkpoint(model) as directory:
        stream_answer(directory, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def _prepare_for(model: str) -> None:
    """Refuse a folder that is not there, and quiet libraries, before anything heavy is imported."""
    from components.runtime import quiet_libraries

    quiet_libraries()
    if "://" not in model and not Path(model).is_dir():
        raise SettingsError(
            [f"MODEL={model} is not a folder. Give the folder or s3:// address of a checkpoint."]
        )


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show core's log lines, for a command that works long and has no tasks."""
    core, handler = logging.getLogger("core"), logging.StreamHandler()
    level = core.level
    core.addHandler(handler)
    core.setLevel(logging.INFO)
    try:
        yield
    finally:
        core.removeHandler(handler)
        core.setLevel(level)
