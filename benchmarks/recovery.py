"""Recovery training under settings beside each other: the same model, target, texts and training tokens.

Prunes the demo's model to 80 % of its parameters and trains it, by the steps of a run and the demo's recipe
under each row's settings, with several seeds of all draws. Measures perplexity on texts that nothing was
trained or calibrated on; the first text, best one of another domain, decides. What is pruned in eight steps
in all is divided over more or fewer phases. A row takes minutes on a core, a table with seeds hours.

A row is a set of settings as `--set` of `adapt-pruner run` takes them: SECTION.KEY=VALUE pairs joined by
commas, beside those that --set gives to all rows. With --results each row is appended to a file as a line of
JSON as soon as it is measured. The same command resumes a stopped run, and other options add rows; rows
measured on another model or text, or under other settings, are kept in the file but ignored.

The last line is a JSON object: the dense figures; for each row and text the perplexity, and what it is as a
multiple of the first row's with the same seed (ratios); the best row of each text; time and memory. A figure
is a mean over seeds, the standard deviation (null for one seed) and the number of seeds.

    python benchmarks/recovery.py --measure-on c4=c4.jsonl --measure-on wikitext2=wikitext2.txt
    python benchmarks/recovery.py --rows training.teacher=none training.teacher=base --seeds 1
    python benchmarks/recovery.py --results recovery.jsonl --set training.tokens=64k
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import fmean

import torch
from demo import RECIPE, model_folder, parser_for, peak_bytes, restart_peak
from methods import digest
from quality import PASSAGES, held_out_windows
from rich.console import Console
from rich.table import Table
from standings import shown, summary
from torch import Tensor

from core.evaluation.perplexity import perplexity
from core.model.build import load_model, load_tokenizer, pick_device
from core.pruning.phases import phase_steps
from core.runs.run import Run
from core.settings.parameters import compiled_settings, parameters_of
from core.settings.recipe import load_recipe
from core.settings.schema import Settings
from core.steps.calibrate import run_calibrate
from core.steps.prepare_data import run_prepare_data
from core.steps.prune_step import run_prune_step
from core.steps.recover_train import run_recover_train
from core.steps.resolve_base import run_resolve_base
from core.steps.score_layers import run_score_layers

COMMON = (
    "prune.target=80%",
    "prune.phases=4",
    "prune.steps_per_phase=2",
    "calibration.precision=float32",
    "training.tokens=30k",
    "training.precision=float32",
    "training.teacher=none",
    "model.dtype=bfloat16",  # as models on the hub are; the demo's is float32, which leaves nothing to round
)
"""Of all rows, beside the demo's recipe."""
TAUGHT = "training.teacher=base"
ROWS = (
    "training.teacher=none",
    f"{TAUGHT},training.distillation_weight=0.5",
    f"{TAUGHT},training.distillation_weight=1",
    f"{TAUGHT},training.distillation_weight=1,training.temperature=2",
    "training.lora_rank=8",
    "training.optimizer_state=carry",
    "model.dtype_between_phases=same",
    "training.packing=whole",
    "prune.phases=1,prune.steps_per_phase=8",
    "prune.phases=2,prune.steps_per_phase=4",
    "prune.phases=8,prune.steps_per_phase=1",
    "training.tokens=0",
)
DENSE = ""
"""The row of the model as it is."""


class Artifact:
    """What a step needs of a KFP artifact."""

    def __init__(self, path: Path) -> None:
        """Use a place for its content."""
        self.path, self.metadata = str(path), {}


class Study:
    """What all rows share, and the rows that are measured."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console) -> None:
        """Load the texts, and what is measured already."""
        self.folder, self.console, self.file = folder, console, arguments.results
        self.base = model_folder(arguments.model, folder)
        self.given = tuple(arguments.set)
        tokenizer = load_tokenizer(self.base)
        self.texts: dict[str, Tensor] = {}
        for named in arguments.measure_on:
            name, _, arguments.measure_on = named.partition("=")
            self.texts[name] = held_out_windows(arguments, tokenizer, folder)
        known = self.file.read_text().splitlines() if self.file and self.file.exists() else []
        self.known = [json.loads(line) for line in known]
        weights = load_model(self.base).parameters()
        # Only rows that were measured alike stand side by side.
        self.alike = {
            "common": list(self.given),
            "inputs": digest([*map(self.texts.get, sorted(self.texts)), *(w.float() for w in weights)]),
        }
        self.rows = []

    def settings(self, row: str, seed: int) -> Settings:
        """Return the settings of a row."""
        own = tuple(row.split(",")) if row else ()
        place = (f"model.base={self.base}", f"seed={seed}", f"storage.store={self.folder / 'store'}")
        return load_recipe(RECIPE, (*COMMON, *self.given, *place, "tracking.uri=", *own))

    def run(self, row: str, seed: int) -> None:
        """Prune, train and measure, unless that is done."""
        settings = self.settings(row, seed)
        key = {"row": row, "seed": seed, "settings": settings.digest() if row else "", **self.alike}
        for measured in self.known:
            if key.items() <= measured.items():
                self.rows.append(measured)
                return
        restart_peak()
        started = time.monotonic()
        report = self.trained(settings) if row else {"checkpoint": str(self.base)}
        seconds, peak = time.monotonic() - started, peak_bytes()
        model = load_model(Path(report.pop("checkpoint")), dtype=torch.float32, device=pick_device())
        measured = {
            **report,
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "perplexity": {name: perplexity(model, text, batch_size=4) for name, text in self.texts.items()},
            "seconds": round(seconds, 1),
            "peak_gb": round(peak / 1e9, 2),
        }
        shutil.rmtree(self.folder / "store" / "runs", ignore_errors=True)
        self.rows.append({**key, **measured})
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        shown = {"seed": seed, **measured}
        self.console.print(row or "dense", *(f"{name}={value}" for name, value in shown.items()))

    def trained(self, settings: Settings) -> dict[str, object]:
        """Take the steps of a run; return where the last checkpoint is, and figures."""
        phases = settings.prune.phases
        fixed = compiled_settings(settings, phases=phases)
        handle, uri, _ = run_resolve_base(**parameters_of(settings), fixed=fixed, job="recovery")
        run, data_uri = Run.load(handle), run_prepare_data(run=handle, base_uri=uri)
        losses, training_s = [], 0.0
        for phase, steps in enumerate(phase_steps(settings.training.total_steps, phases), start=1):
            given = {"run": handle, "phase": phase, "data_uri": data_uri}
            artifact = Artifact(self.folder / "artifact")
            run_calibrate(**given, checkpoint_uri=uri, statistics=artifact)
            run_score_layers(**given, checkpoint_uri=uri, plan=artifact)
            pruned = run_prune_step(**given, checkpoint_uri=uri, model=artifact)
            uri = run_recover_train(**given, checkpoint_uri=pruned, model=artifact)
            if steps:
                report = json.loads(Path(uri, "report.json").read_text())
                losses += [loss for _, loss, *_ in report["losses"]]
                training_s += report["seconds"]
                shutil.rmtree(pruned)
            if phase > 1:
                shutil.rmtree(run.uri("phases", f"{phase - 1:02d}"))  # the disk would fill up
        return {"checkpoint": uri, "losses": losses, "training_s": round(training_s, 1)}


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", help="checkpoint folder; default: the demo's model")
    parser.add_argument(
        "--measure-on",
        action="append",
        metavar="NAME=TEXT",
        help="held-out text, once or more; the first decides (default: the rest of the passages)",
    )
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of all draws (default: 3)")
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, metavar="SECTION.KEY=VALUE,...", help="settings of each row"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of all rows"
    )
    parser.add_argument("--results", type=Path, help="file of measured rows; those in it are not run again")
    arguments = parser.parse_args()
    arguments.measure_on = arguments.measure_on or [f"passages={PASSAGES}#validation[90%:]"]
    console = Console(highlight=False, width=150)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        study = Study(arguments, Path(folder), console)
        for row in arguments.rows:
            study.settings(row, 0)  # what is wrong shows at once
        study.run(DENSE, 0)
        for seed in range(arguments.seeds):
            for row in arguments.rows:
                study.run(row, seed)
    groups = {row: [found for found in study.rows if found["row"] == row] for row in (DENSE, *arguments.rows)}
    console.print(table(groups, list(study.texts)))
    print(json.dumps(figures(groups)))


def perplexities(rows: list[dict[str, object]], text: str) -> list[float]:
    """Return what the rows measured on a text."""
    return [row["perplexity"][text] for row in rows]


def table(groups: dict[str, list[dict[str, object]]], texts: list[str]) -> Table:
    """Return the rows, best first on the first text."""
    result = Table("settings", "seeds", *texts, "s", "GB")
    for name, rows in sorted(groups.items(), key=lambda group: fmean(perplexities(group[1], texts[0]))):
        result.add_row(
            name or "dense",
            str(len(rows)),
            *(shown(perplexities(rows, text), 2) for text in texts),
            f"{fmean(row['seconds'] for row in rows):.0f}",
            f"{max(row['peak_gb'] for row in rows):.1f}",
        )
    return result


def figures(groups: dict[str, list[dict[str, object]]]) -> dict[str, object]:
    """Return the figures of the last line."""
    of_rows = {name: rows for name, rows in groups.items() if name != DENSE}
    dense, first = groups[DENSE][0]["perplexity"], next(iter(of_rows.values()))

    def means(name: str) -> dict[str, float]:
        return {row: round(fmean(found[name] for found in rows), 2) for row, rows in of_rows.items()}

    def ratios(rows: list[dict[str, object]], text: str) -> dict[str, float | int | None]:
        pairs = zip(perplexities(rows, text), perplexities(first, text), strict=True)
        return summary([own / other for own, other in pairs])

    ppl = {row: {text: summary(perplexities(rows, text)) for text in dense} for row, rows in of_rows.items()}
    return {
        "benchmark": "recovery",
        "dense_ppl": dense,
        "best": {text: min(ppl, key=lambda row: ppl[row][text]["mean"]) for text in dense},
        "ppl": ppl,
        "ratios": {row: {text: ratios(rows, text) for text in dense} for row, rows in of_rows.items()},
        "seconds": means("seconds"),
        "peak_gb": means("peak_gb"),
    }


if __name__ == "__main__":
    main()
