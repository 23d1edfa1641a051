"""Quality after pruning without training: uniform against adaptive, by attention unit and number of steps.

Prunes the demo's model to 80, 60 and 40 % of its parameters in every combination, with several seeds; repairs
nothing.
Measures perplexity on text that was not used for calibration, and zero-shot accuracy for the default
settings. Two rows represent the authors' published scheme: KV groups at the MLP's sparsity, in steps of 2 %,
up to the first count below the target, with A = 0.02 (the reference) and with A = 0 (the uniform reference).
Takes an hour on a laptop; --results keeps the measurements in a file, from which a stopped run resumes.

    python benchmarks/quality.py --calibrate-on corpus.jsonl --measure-on wikitext2.txt
    python benchmarks/quality.py --seeds 1 --windows 8 --results quality.jsonl
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
from demo import DEMO, model_folder, table_of
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from core.data.samples import write_calibration_pool, write_perplexity_windows
from core.errors import TargetError
from core.evaluation.benchmarks import evaluate_tasks
from core.evaluation.perplexity import perplexity
from core.model.build import load_model, load_tokenizer, model_shape, pick_device
from core.model.shape import ModelShape
from core.pruning.phases import MAX_STEP_SHARE
from core.pruning.plan import select_groups
from core.pruning.planning import StepRequest, plan_step, sizing_for
from core.pruning.scoring.calibration import draw_calibration, measure
from core.pruning.scoring.statistics import Statistics
from core.pruning.sparsity import next_sparsity, normalise_importance, sizes_at
from core.pruning.surgery import prune_model
from core.settings.evaluation import EvaluationSettings
from core.settings.prune import PruneSettings
from core.settings.texts import TextSource

PASSAGES = DEMO.calibration.source.path
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


DENSE = Scheme("dense", "", "", 0.0)
REFERENCE = Scheme("reference", "kv_group", "steps of 2 %", 0.02)
UNIFORM_REFERENCE = Scheme("uniform reference", "kv_group", "steps of 2 %", 0.0)


@dataclass
class Study:
    """The inputs that all rows share, and the measured rows."""

    base: PreTrainedModel
    tokenizer: object
    pool: Tensor
    windows: Tensor
    sequences: int
    items: int
    console: Console
    file: Path | None
    rows: list[dict[str, object]]
    """Measured rows: scheme, share removed, seed, parameters left, perplexity and so on."""

    def statistics(self, model: PreTrainedModel, seed: int, step: int) -> Statistics:
        """Measure a model on the calibration draw of a step."""
        tokens = draw_calibration(self.pool, sequences=self.sequences, seed=seed, step=step)
        return measure(model, tokens, criterion=DEFAULT.criterion, keep_bytes=KEEP_BYTES)

    def perplexity(self, model: PreTrainedModel) -> float:
        """Measure a model on the held-out text."""
        return perplexity(model, self.windows, batch_size=4)

    def is_done(self, scheme: Scheme, removed: float, seed: int) -> bool:
        """Return whether a row has already been measured."""
        key = {**dataclasses.asdict(scheme), "removed": removed, "seed": seed}
        return any(key.items() <= row.items() for row in self.rows)

    def record(
        self, scheme: Scheme, removed: float, seed: int, model: PreTrainedModel, *, accuracy: bool = False
    ) -> None:
        """Measure a model for a row."""
        dense, shape = model_shape(self.base.config), model_shape(model.config)
        row = {
            **dataclasses.asdict(scheme),
            "removed": removed,
            "seed": seed,
            "left": shape.num_params() / dense.num_params(),
            "attention_removed": 1 - attention_params(shape) / attention_params(dense),
            "perplexity": self.perplexity(model),
            "accuracy": zero_shot(model, self.tokenizer, self.items) if accuracy and self.items else None,
        }
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.console.print(
            f"seed {seed}: {scheme.name}, {scheme.unit}, {scheme.steps}, -{removed:.0%}: "
            f"{row['left']:.1%} left, {row['attention_removed']:.1%} of attention gone, "
            f"perplexity {row['perplexity']:,.1f}"
        )


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Measure the quality of pruned models without training.")
    parser.add_argument("--model", help="checkpoint folder; default: the demo's model")
    parser.add_argument("--calibrate-on", default=f"{PASSAGES}#validation[:90%]", metavar="TEXT")
    parser.add_argument("--measure-on", default=f"{PASSAGES}#validation[90%:]", metavar="TEXT")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences (default: 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the calibration draws (default: 3)")
    parser.add_argument("--results", type=Path, help="file of measured rows; rows already in it are skipped")
    parser.add_argument("--items", type=int, default=100, help="items of each benchmark; 0 for none")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=120)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        directory = Path(arguments.model) if arguments.model else model_folder(None, Path(folder))
        tokenizer = load_tokenizer(directory)
        known = (
            arguments.results.read_text().splitlines()
            if arguments.results and arguments.results.exists()
            else []
        )
        study = Study(
            base=load_model(directory, dtype=torch.bfloat16, device=pick_device()),
            tokenizer=tokenizer,
            pool=calibration_pool(arguments, tokenizer, Path(folder)),
            windows=held_out_windows(arguments, tokenizer, Path(folder)),
            sequences=arguments.sequences,
            items=arguments.items,
            console=console,
            file=arguments.results,
            rows=[json.loads(line) for line in known],
        )
        if not study.is_done(DENSE, 0.0, 0):
            study.record(DENSE, 0.0, 0, study.base, accuracy=True)
        seeds = range(arguments.seeds)
        for seed in seeds:
            references(study, seed)
        for scheme, settings in variants(("auto", "kv_group", "query_head"), "several steps"):
            for seed in seeds:
                several_steps(study, scheme, settings, seed)
        for seed in seeds:
            one_step(study, seed)
    show(console, study)
    console.print(f"{time.monotonic() - started:,.0f} s")
    print(json.dumps(figures(study, arguments)))


def source(text: str) -> TextSource:
    """Read ``PATH`` or ``PATH#SPLIT``; the demo's passages are in a column of another name."""
    path, _, split = text.partition("#")
    return TextSource(path=path, split=split or "train", field="passage" if path == PASSAGES else "text")


def calibration_pool(
    arguments: argparse.Namespace, tokenizer: object, folder: Path, *, packing: bool = False
) -> Tensor:
    """Return (P, T) token ids to draw from; with packing, texts shorter than T are joined."""
    path = folder / "pool.safetensors"
    write_calibration_pool(
        source(arguments.calibrate_on),
        tokenizer,
        sequence_length=arguments.length,
        packing=packing,
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
    for name, amplitude in (("adaptive", DEFAULT.amplitude), ("uniform", 0.0)):
        for unit in units:
            settings = dataclasses.replace(DEFAULT, amplitude=amplitude, attention_unit=unit)
            yield Scheme(name, unit, steps, amplitude), settings


def one_step(study: Study, seed: int) -> None:
    """Prune to each size at once; one measurement serves all rows."""
    todo = [
        (scheme, settings, removed)
        for scheme, settings in variants(("auto", "none", "kv_group", "query_head"), "one step")
        for removed in REMOVED
        if not study.is_done(scheme, removed, seed)
    ]
    statistics, dense = (
        study.statistics(study.base, seed, 0) if todo else None,
        model_shape(study.base.config),
    )
    for scheme, settings, removed in todo:
        with contextlib.suppress(TargetError):  # MLPs alone do not hold 60 % of the parameters
            step = plan_step(
                StepRequest(
                    statistics=statistics,
                    dense=dense,
                    current=dense,
                    sparsity=(0.0,) * len(dense.layers),
                    target_params=round(dense.num_params() * (1 - removed)),
                    steps_left=1,
                    settings=settings,
                )
            )
            study.record(scheme, removed, seed, prune_model(study.base, step.layers))


def several_steps(study: Study, scheme: Scheme, settings: PruneSettings, seed: int) -> None:
    """Prune by a twentieth of the dense model at a time; each size is passed on the way to the next."""
    dense = model_shape(study.base.config)
    model, current, sparsity, number = study.base, dense, (0.0,) * len(dense.layers), 0
    for wanted in REMOVED:
        if all(study.is_done(scheme, removed, seed) for removed in REMOVED if removed >= wanted):
            break
        while number < round(wanted / MAX_STEP_SHARE):
            step = plan_step(
                StepRequest(
                    statistics=study.statistics(model, seed, number),
                    dense=dense,
                    current=current,
                    sparsity=sparsity,
                    target_params=round(dense.num_params() * (1 - (number + 1) * MAX_STEP_SHARE)),
                    steps_left=1,
                    settings=settings,
                )
            )
            model, current, sparsity = prune_model(model, step.layers), step.shape, step.sparsity
            number += 1
        if not study.is_done(scheme, wanted, seed):
            default = scheme.unit == DEFAULT.attention_unit
            study.record(scheme, wanted, seed, model, accuracy=default and seed == 0)


def references(study: Study, seed: int) -> None:
    """Prune as the authors' code does: no exact target, but the first count below 80 % of the parameters."""
    dense = model_shape(study.base.config)
    for scheme in (REFERENCE, UNIFORM_REFERENCE):
        if study.is_done(scheme, REMOVED[0], seed):
            continue
        settings = dataclasses.replace(DEFAULT, attention_unit="kv_group", amplitude=scheme.amplitude)
        model, current, sparsity, number = study.base, dense, (0.0,) * len(dense.layers), 0
        while current.num_params() > (1 - REMOVED[0]) * dense.num_params():
            statistics = study.statistics(model, seed, number)
            importance = normalise_importance([-s for s in statistics.similarities.tolist()])
            sparsity = next_sparsity(sparsity, importance, step=0.02, amplitude=scheme.amplitude)
            sizes = sizes_at(sizing_for(settings, dense, current), sparsity)
            plans = tuple(map(select_groups, statistics.scores, current.layers, sizes))
            model, current, number = prune_model(model, plans), current.with_layers(sizes), number + 1
        study.record(scheme, REMOVED[0], seed, model)


def attention_params(shape: ModelShape) -> int:
    """Return the number of parameters of all attention groups."""
    return sum(shape.attention_params(layer) for layer in shape.layers)


def zero_shot(model: PreTrainedModel, tokenizer: object, items: int) -> float:
    """Return the mean accuracy on ARC-easy and PIQA."""
    data = dict(DEMO.evaluation.task_data)
    found = evaluate_tasks(
        model, tokenizer, EvaluationSettings(tasks=tuple(data), task_data=data, limit=items)
    )
    return fmean(metrics["acc"] for metrics in found.values())


def grouped(study: Study, removed: float) -> list[tuple[Scheme, list[dict[str, object]]]]:
    """Return the rows of a size by scheme, lowest perplexity first."""
    groups: dict[Scheme, list[dict[str, object]]] = defaultdict(list)
    for row in study.rows:
        if row["removed"] == removed:
            groups[Scheme(**{field.name: row[field.name] for field in dataclasses.fields(Scheme)})].append(
                row
            )
    return sorted(groups.items(), key=lambda group: mean(group[1], "perplexity"))


def mean(rows: Sequence[dict[str, object]], name: str) -> float:
    """Return the mean of a figure over seeds."""
    return fmean(float(str(row[name])) for row in rows)


def show(console: Console, study: Study) -> None:
    """Print one table per size."""
    (dense,) = grouped(study, 0.0)[0][1]
    accuracy = "" if dense["accuracy"] is None else f", accuracy {dense['accuracy']:.3f}"
    for removed in REMOVED:
        title = f"{removed:.0%} removed (dense: perplexity {dense['perplexity']:.1f}{accuracy})"
        headers = ("parameters left", "attention removed", "perplexity", "± seeds", "seeds", "accuracy")
        table = table_of(title, ["layers", "attention unit", "steps"], headers)
        for scheme, rows in grouped(study, removed):
            values = [float(str(row["perplexity"])) for row in rows]
            hits = [row["accuracy"] for row in rows if row["accuracy"] is not None]
            table.add_row(
                scheme.name,
                scheme.unit,
                scheme.steps,
                f"{mean(rows, 'left'):.1%}",
                f"{mean(rows, 'attention_removed'):.1%}",
                f"{fmean(values):,.1f}",
                f"{stdev(values):,.1f}" if len(values) > 1 else "",
                str(len(rows)),
                f"{hits[0]:.3f}" if hits else "",
            )
        console.print(table)


def figures(study: Study, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the figures of the last line: means over seeds."""
    found = {(scheme, share): rows for share in (0.0, *REMOVED) for scheme, rows in grouped(study, share)}

    def perplexity_of(scheme: Scheme, removed: float) -> float:
        return round(mean(found[scheme, removed], "perplexity"), 2)

    default = Scheme("adaptive", DEFAULT.attention_unit, "several steps", DEFAULT.amplitude)
    dense, reference = perplexity_of(DENSE, 0.0), perplexity_of(REFERENCE, REMOVED[0])
    return {
        "benchmark": "quality",
        "seeds": arguments.seeds,
        "calibration_tokens": arguments.sequences * arguments.length,
        "dense_ppl": dense,
        "adaptive_ppl_20": perplexity_of(default, 0.20),
        "adaptive_ppl_40": perplexity_of(default, 0.40),
        "adaptive_ppl_60": perplexity_of(default, 0.60),
        "uniform_ppl_20": perplexity_of(UNIFORM_REFERENCE, 0.20),
        "reference_ppl_20": reference,
        "adaptive_rise_20": round(perplexity_of(default, 0.20) - dense, 2),
        "reference_rise_20": round(reference - dense, 2),
        "best": {f"{removed:.0%}": dataclasses.asdict(grouped(study, removed)[0][0]) for removed in REMOVED},
        "accuracy": {
            f"{scheme.name} {removed:.0%}": round(float(str(rows[0]["accuracy"])), 3)
            for (scheme, removed), rows in found.items()
            if rows[0]["accuracy"] is not None
        },
    }


if __name__ == "__main__":
    main()
