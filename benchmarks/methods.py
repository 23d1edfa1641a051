"""Quality of pruned models beside each other: every method at equal size and on equal calibration text.

Prunes the demo's model to 80 and 60 % of its parameters by each row's settings, as score-layers and
prune-step do it, with several seeds of the calibration draws. Measures perplexity on texts that nothing was
calibrated on; the first text, best one of another domain, decides. Takes hours on a laptop.

A row is a set of prune settings at one size and with one seed: KEY=VALUE pairs joined by commas. --results
appends each row to a file, as a line of JSON, once it is measured. The same command resumes a stopped run,
and other options add rows; rows of another model, calibration set or text are kept but ignored.

The last line is a JSON object: the dense figures; for each size the row of the lowest perplexity, the rise of
each row over the dense model as a share of the rise of the best compared method (rise_ratios), and of our
default (rise_ratio), over the seeds that both were measured with; time and memory. A figure is a mean over
seeds, the standard deviation (null for one seed) and the number of seeds; rows with fewer seeds than others
are listed (incomplete).

All rows get the same text: a distillation takes the tokens of the repair, as often as its updates need them.
Ours takes steps of 5 %, each scored on another draw, unless a row has steps_per_phase=1.

    python benchmarks/methods.py --measure-on c4=c4.jsonl --rows criterion=wanda_sp --results methods.jsonl
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from demo import DEMO, model_folder, parser_for, peak_bytes, restart_peak
from quality import PASSAGES, calibration_pool, held_out_windows
from rich.console import Console
from standings import OURS, figures, picture, table
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import SettingsError
from core.evaluation.benchmarks import evaluate_tasks
from core.evaluation.perplexity import perplexity
from core.model.build import load_model, load_tokenizer, model_shape, pick_device
from core.pruning.methods.pruned import pruned_model
from core.pruning.scoring.calibration import draw_calibration, measure
from core.pruning.scoring.statistics import Statistics
from core.pruning.self_calibration import write_text
from core.quantities import parse_count
from core.report.drawing import inline_svg
from core.settings.evaluation import EvaluationSettings
from core.settings.identity import settings_of_kind
from core.settings.methods import FIXED
from core.settings.prune import PruneSettings
from core.settings.recipe import load_yaml, settings_from_dict
from core.training.distillation import distill

EXTRAS = ("distill_steps=96", "distill_steps=96,criterion=wanda_sp,attention_unit=none")
EXTRAS += ("criterion=wanda_sp,attention_unit=none", "repair=none")
PEERS = tuple(
    f"method={name}" if "attention_unit" in FIXED[name] else f"method={name},attention_unit=none"
    for name in FIXED
    if name != "adapt-pruner"
)
"""The compared methods, all on MLPs alone: on few KV heads, those that take attention, too, are worse."""
ROWS = (OURS, *(f"{OURS},{extra}" for extra in EXTRAS), *PEERS)
KEEP_BYTES = 2 * 10**9
REPAIR_DRAW = 999
MICRO_BATCH = 8
DENSE = ""
"""The row of the model as it is."""


class Study:
    """What all rows share, and the rows that are measured."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console) -> None:
        """Load the model, the texts, and what is measured already."""
        directory = model_folder(arguments.model, folder)
        self.tokenizer = load_tokenizer(directory)
        self.base = load_model(directory, dtype=torch.float32, device=pick_device())
        self.params = model_shape(self.base.config).num_params()
        self.pool = calibration_pool(arguments, self.tokenizer, folder, packing=arguments.packing)
        self.texts: dict[str, Tensor] = {}
        for named in arguments.measure_on:
            name, _, arguments.measure_on = named.partition("=")
            self.texts[name] = held_out_windows(arguments, self.tokenizer, folder)
        self.console, self.file, self.sequences = console, arguments.results, arguments.sequences
        self.bfloat16, self.tokens, self.items = arguments.bfloat16, arguments.tokens, arguments.items
        known = self.file.read_text().splitlines() if self.file and self.file.exists() else []
        # Only rows that were measured alike stand side by side.
        self.alike = {
            "scored_tokens": arguments.sequences * arguments.length,
            "repair_tokens": arguments.tokens,
            "bfloat16": arguments.bfloat16,
            "items": arguments.items,
            "inputs": digest([self.pool, *self.base.parameters(), *map(self.texts.get, sorted(self.texts))]),
        }
        self.rows = [
            row for row in map(json.loads, known) if self.alike.items() <= row.items() and still_meant(row)
        ]
        self.written: dict[tuple[int, int], Tensor] = {}
        self.of_base: dict[tuple[str, str, int], Statistics] = {}

    def run(self, row: str, removed: float, seed: int) -> None:
        """Prune, repair, distill and measure, unless that is done."""
        settings = settings_of(row)
        key = {"row": row, "removed": removed, "seed": seed, "settings": meant(settings) if row else {}}
        if any(key.items() <= known.items() for known in self.rows):
            return
        restart_peak()
        started = time.monotonic()
        model = self.pruned(settings, removed, seed) if row else self.base
        seconds, peak = time.monotonic() - started, peak_bytes()
        if self.bfloat16:
            model = torch.nn.Module.to(copy.deepcopy(model), torch.bfloat16)
        found = {name: perplexity(model, windows, batch_size=4) for name, windows in self.texts.items()}
        measured = {
            "left": round(model_shape(model.config).num_params() / self.params, 4),
            "perplexity": found,
            "accuracy": self.accuracy(model) if self.items else {},
            "seconds": round(seconds, 1),
            "peak_gb": round(peak / 1e9, 2),
        }
        self.rows.append({**key, **self.alike, **measured})
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.console.print(" ".join(f"{name}={value}" for name, value in (key | measured).items()))

    def pruned(self, settings: PruneSettings, removed: float, seed: int) -> PreTrainedModel:
        """Return the base model less a share of its parameters."""
        tokens = self.given_text(settings, seed)
        model = pruned_model(
            self.base,
            self.statistics(self.base, settings, seed, 0),
            settings=settings,
            target_params=round(self.params * (1 - removed)),
            remeasure=lambda left, step: self.statistics(left, settings, seed, step),
            tokens=tokens,
            keep_bytes=KEEP_BYTES,
            seed=seed,
        )
        if settings.distill_steps:
            model = copy.deepcopy(model).requires_grad_(True)
            batch = parse_count(settings.distill_batch_tokens) // self.pool.shape[1]
            distill(
                model,
                self.base,
                tokens,
                steps=settings.distill_steps,
                rate=settings.distill_rate,
                batch=batch,
                micro_batch=MICRO_BATCH,
                autocast=self.bfloat16,
                seed=seed,
            )
        return model

    def given_text(self, settings: PruneSettings, seed: int) -> Tensor:
        """Return (S, T) token ids that repairs and distillations take: the same for each row, and its own."""
        given = self.drawn(self.tokens // self.pool.shape[1], seed, REPAIR_DRAW)
        return torch.cat([given, self.own_text(settings, seed)])

    def own_text(self, settings: PruneSettings, seed: int) -> Tensor:
        """Return (S, T) token ids that the base model writes itself."""
        length = self.pool.shape[1]
        wanted = -(-parse_count(settings.generated_tokens) // length)
        if not wanted:
            return self.pool[:0].long()
        if (wanted, seed) not in self.written:
            dtype = torch.bfloat16 if self.bfloat16 else torch.float32
            model = torch.nn.Module.to(copy.deepcopy(self.base), dtype)
            asked = {"sequences": wanted, "length": length, "batch": 128, "seed": seed}
            self.written[wanted, seed] = write_text(model, self.tokenizer, **asked)
        return self.written[wanted, seed]

    def drawn(self, sequences: int, seed: int, step: int) -> Tensor:
        """Return (S, T) token ids of a calibration draw."""
        return draw_calibration(self.pool, sequences=sequences, seed=seed, step=step)

    def statistics(self, model: PreTrainedModel, settings: PruneSettings, seed: int, step: int) -> Statistics:
        """Score a model's groups on the calibration draw of a step."""
        applied = settings.applied()
        key = applied.criterion, applied.similarity, seed
        if model is self.base and key in self.of_base:
            return self.of_base[key]
        tokens = self.drawn(self.sequences, seed, step)
        found = measure(
            model,
            tokens,
            criterion=applied.criterion,
            similarity=applied.similarity,
            seed=seed,
            keep_bytes=KEEP_BYTES,
        )
        if model is self.base:
            self.of_base[key] = found
        return found

    def accuracy(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the accuracy on each of the demo's tasks."""
        data = dict(DEMO.evaluation.task_data)
        settings = EvaluationSettings(tasks=tuple(data), task_data=data, limit=self.items)
        found = evaluate_tasks(model, self.tokenizer, settings)
        return {task: metrics["acc"] for task, metrics in found.items()}


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", help="checkpoint folder; default: the demo's model")
    parser.add_argument("--calibrate-on", default=f"{PASSAGES}#validation[:90%]", metavar="TEXT")
    parser.add_argument(
        "--measure-on",
        action="append",
        metavar="NAME=TEXT",
        help="held-out text, once or more; the first decides (default: the rest of the passages)",
    )
    parser.add_argument("--sequences", type=int, default=64, help="sequences that score (default: 64)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--packing", action="store_true", help="join short texts into sequences")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the calibration draws (default: 3)")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.4], help="shares to remove")
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, metavar="KEY=VALUE,...", help="settings of the section prune"
    )
    parser.add_argument(
        "--tokens", type=int, default=32_768, help="tokens of a repair or a distillation (default: 32768)"
    )
    parser.add_argument("--items", type=int, default=0, help="items of ARC-easy and of PIQA (default: 0)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="distill under autocast, and measure in bfloat16"
    )
    parser.add_argument("--results", type=Path, help="file of measured rows; those in it are not run again")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="also draw the rows that are asked for")
    arguments = parser.parse_args()
    for row in arguments.rows:
        try:
            settings_of(row)
        except SettingsError as error:
            parser.error(f"--rows {row}: {error}")
    for share in arguments.removed:
        if not 0 < share < 1:
            parser.error(f"--removed {share:g}: a share of the parameters lies between 0 and 1")
    if (drawn := arguments.picture) and (drawn.suffix != ".svg" or not drawn.parent.is_dir()):
        parser.error(f"--picture {drawn}: name a file that ends with .svg, in a folder that exists")
    arguments.measure_on = arguments.measure_on or [f"passages={PASSAGES}#validation[90%:]"]
    console = Console(highlight=False, width=150)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        study = Study(arguments, Path(folder), console)
        study.run(DENSE, 0.0, 0)
        for seed, removed in itertools.product(range(arguments.seeds), arguments.removed):
            for row in arguments.rows:
                study.run(row, removed, seed)
    texts = list(study.texts)
    console.print(table(study.rows, texts))
    if arguments.picture:
        asked = {(DENSE, 0.0), *itertools.product(arguments.rows, arguments.removed)}
        drawn = [row for row in study.rows if (row["row"], row["removed"]) in asked]
        figure = picture(drawn, texts)
        arguments.picture.write_text(
            inline_svg(figure, name="methods", label="pruned models beside each other")
        )
    print(json.dumps({"benchmark": "methods", **figures(study.rows)}))


def settings_of(row: str) -> PruneSettings:
    """Return the settings of a row; raise SettingsError if there is anything wrong with them."""
    pairs = [pair.partition("=") for pair in row.split(",") if pair]
    given = {name: load_yaml(value) for name, _, value in pairs}
    return settings_from_dict(dataclasses.asdict(DEMO) | {"prune": {"phases": 1} | given}).prune


def meant(settings: PruneSettings) -> dict[str, object]:
    """Return the settings that a row stands for, whatever the defaults: what a run's key is made of."""
    found = settings_of_kind(settings.applied(), "result")
    return {name: value for name, value in found.items() if name not in ("target", "phases")}


def still_meant(measured: dict[str, object]) -> bool:
    """Return whether the settings of a measured row are what the row stands for today."""
    row = measured["row"]
    try:
        return measured["settings"] == (meant(settings_of(row)) if row else {})
    except SettingsError:
        return False


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the values of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().numpy())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    main()
