"""Commands that look at a model: its sizes, its quality, its weak spots, its answers."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.errors import SettingsError
from pipelines.commands.console import MODEL_HELP, example, log_on_stderr, prepare_for

if TYPE_CHECKING:
    from core.evaluation.speed.workload import Runtime
    from core.export.gguf_quantization import GgufDtype
    from core.pruning.sensitivity import Part


@click.command(
    epilog=example("adapt-pruner inspect output/model"),
    help="Show the sizes and parameters of every layer of MODEL.\n\n"
    f"{MODEL_HELP}. Only its config.json is read; a folder that a run has published is verified whole.",
)
@click.argument("model")
def inspect(model: str) -> None:
    """Show the sizes of every layer."""
    prepare_for(model)

    from rich import print as show

    from pipelines.models import layer_table, local_checkpoint, verified_text

    with local_checkpoint(model, only=("config.json",)) as directory:
        show(layer_table(directory))
        if text := verified_text(directory):
            click.echo(text)


@click.command(
    epilog=example(
        "adapt-pruner evaluate output/model --recipe recipes/demo.yaml",
        "adapt-pruner evaluate output/model --task arc_easy --task piqa --limit 200",
    ),
    help="Measure the perplexity of MODEL and its accuracy on benchmarks.\n\n"
    f"{MODEL_HELP}. What is measured stands in the evaluation section of a recipe, or in the options, which "
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
    prepare_for(model)

    from rich import print as show

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

    from pipelines.models import evaluation_table, local_checkpoint

    with log_on_stderr(), local_checkpoint(model) as directory:
        show(evaluation_table(directory, settings))


@click.command(
    epilog=example(
        "adapt-pruner benchmark output/model --against base-model",
        "adapt-pruner benchmark output/model --against base-model --runtime llama.cpp --gguf-dtype q8_0",
    ),
    help="Measure how fast MODEL is beside another, its base: prompts, decoding, loading, memory.\n\n"
    f"{MODEL_HELP}. Both are held in memory at once and measured in turn, so that what else the machine does "
    "slows both down alike. A ratio above 1 is better for MODEL.",
)
@click.argument("model")
@click.option("--against", required=True, metavar="MODEL", help="The model to compare with.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(["torch", "llama.cpp"]),
    help="Where to run them; may be given twice. llama.cpp takes the package xllamacpp.  [default: all]",
)
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens a prompt."
)
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens decoded.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1, 256),
    default=(1, 4),
    show_default=True,
    help="Sequences at a time; may be given several times.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Times to measure.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: physical cores]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Number format in PyTorch; auto is the checkpoints' own.",
)
@click.option(
    "--gguf-dtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Number format in llama.cpp.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here as well.")
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

    from rich import print as show

    from core.evaluation.speed.workload import Workload
    from core.model.build import pick_device
    from core.steps.speed import compare_speed
    from pipelines.models import local_checkpoint, params_of, speed_table

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
        show(speed_table(record, params))
    if json_file is not None:
        data = {"params": params, "workload": workload, "speed": [record.to_dict() for record in records]}
        json_file.write_text(json.dumps(data, indent=1))


@click.command(
    epilog=example(
        "adapt-pruner sensitivity output/model --text held-out.txt",
        "adapt-pruner sensitivity output/model --recipe recipes/demo.yaml --sparsity 0.3 --part mlp",
    ),
    help="Prune each layer of MODEL alone and show how much the loss grows.\n\n"
    f"{MODEL_HELP}. The groups that matter least to the loss on a calibration text go, and the loss is "
    "measured on another text. With a recipe its calibration and evaluation sections name the texts, and "
    "groups are scored as a run of it would; with --text alone, its first half is calibrated on. The losses "
    "take memory for the whole model. MODEL stays as it is.",
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
    prepare_for(model)

    from core.settings.recipe import load_recipe
    from pipelines.local.folders import check_folders

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
    with log_on_stderr(), local_checkpoint(model) as directory:
        result = study.run(directory)
    study.write(result, output)
    console = Console(highlight=False)
    console.print(study.table(result))
    console.print(f"picture      {output / 'sensitivity.html'}", soft_wrap=True, markup=False)
    console.print(f"numbers      {output / 'sensitivity.json'}", soft_wrap=True, markup=False)


@click.command(
    epilog=example('adapt-pruner generate output/model "What is the capital of France?"'),
    help="Let MODEL answer PROMPT.\n\n"
    f"{MODEL_HELP}. A model with a chat template gets the prompt as the user's message, any other continues "
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
    prepare_for(model)

    from pipelines.models import local_checkpoint, stream_answer

    with local_checkpoint(model) as directory:
        stream_answer(directory, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
