"""Quality of pruned models without training, method beside method: equal size, equal calibration text.

Prunes the demo's model to 80 and 60 % of its parameters by each criterion, with and without repair, with
several seeds of the calibration draws. Measures perplexity on texts that nothing was calibrated on; the first
text, best one of another domain, decides. Takes hours on a laptop.

A row is a criterion, what attention loses, a number of steps and a repair, at one size and with one seed.
With --results each row is appended to a file as a line of JSON as soon as it is measured. The same command
resumes a stopped run, and other options add rows; rows measured on another model, calibration set or text are
kept in the file but ignored.

The last line is a JSON object: the dense perplexities, and for each size the best method of those with the
most seeds, its perplexity, and what each repair leaves of the rise over the dense model. A figure is a mean
over seeds, the standard deviation (null for one seed) and the number of seeds.

    python benchmarks/methods.py --measure-on c4=c4.jsonl --measure-on wikitext2=wikitext2.txt
    python benchmarks/methods.py --criteria wanda_sp --seeds 1 --ridges 0.03 0.1 0.3 --results methods.jsonl
    python benchmarks/methods.py --criteria taylor_l1 --attention none auto --steps 1 4 --repairs ridge once
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from demo import model_folder, parser_for
from quality import PASSAGES, calibration_pool, held_out_windows
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from core.evaluation.perplexity import perplexity
from core.model.build import load_model, load_tokenizer, model_shape, pick_device
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel
from core.pruning.plan import LayerPlan
from core.pruning.planning import plan_step
from core.pruning.repair import Repair
from core.pruning.scoring.calibration import draw_calibration, measure
from core.pruning.scoring.statistics import Statistics
from core.pruning.surgery import prune_model
from core.settings.prune import CriterionName, PruneSettings

CRITERIA = ("taylor_l1", "activation_l2", "wanda_sp", "fluctuation")
KEEP_BYTES = 2 * 10**9
REPAIR_DRAW = 999


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        criterion: What ranks the groups.
        attention: What attention loses, as in ``prune.attention_unit``.
        steps: Cuts of equal size; the groups are scored again before each.
        repair: ``none``, ``ridge`` (after each step) or ``once`` (a ridge after the last, for all steps).
        ridge: Strength of the ridge; 0 without repair.
        tokens: Tokens that each repair is computed from; 0 without.
    """

    criterion: str = ""
    attention: str = "none"
    steps: int = 1
    repair: str = "none"
    ridge: float = 0.0
    tokens: int = 0

    def __str__(self) -> str:
        """Return the name of the row, less what is as by default."""
        steps = f"{self.steps} steps" if self.steps != 1 else ""
        attention = self.attention if self.attention != "none" else ""
        repair = f"{self.repair} {self.ridge:g} {self.tokens}" if self.repair != "none" else ""
        return ", ".join(filter(None, [self.criterion, attention, steps, repair]))

    def unrepaired(self) -> "Method":
        """Return the row without its repair."""
        return dataclasses.replace(self, repair="none", ridge=0.0, tokens=0)


DENSE = Method()


class Study:
    """What all rows share, and the rows that are measured."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console) -> None:
        """Load the model, the texts, and what is measured already."""
        directory = model_folder(arguments.model, folder)
        tokenizer = load_tokenizer(directory)
        self.base = load_model(directory, dtype=torch.float32, device=pick_device())
        self.pool = calibration_pool(arguments, tokenizer, folder)
        self.texts: dict[str, Tensor] = {}
        for named in arguments.measure_on:
            name, _, arguments.measure_on = named.partition("=")
            self.texts[name] = held_out_windows(arguments, tokenizer, folder)
        self.console, self.file, self.sequences = console, arguments.results, arguments.sequences
        known = self.file.read_text().splitlines() if self.file and self.file.exists() else []
        # Only rows that were measured alike stand side by side.
        self.alike = {
            "scored_tokens": arguments.sequences * arguments.length,
            "windows": arguments.windows,
            "texts": sorted(self.texts),
            "inputs": digest([self.pool, *self.base.parameters(), *map(self.texts.get, sorted(self.texts))]),
        }
        self.of_base: dict[tuple[str, int], Statistics] = {}
        self.rows = [row for row in map(json.loads, known) if self.alike.items() <= row.items()]

    def run(self, method: Method, removed: float, seed: int) -> None:
        """Prune, repair and measure, unless that is done."""
        key = {**dataclasses.asdict(method), "removed": removed, "seed": seed}
        if any(key.items() <= row.items() for row in self.rows):
            return
        started = time.monotonic()
        model = self.base if method == DENSE else self.pruned(method, removed, seed)
        seconds = time.monotonic() - started
        found = {name: perplexity(model, windows, batch_size=4) for name, windows in self.texts.items()}
        left = model_shape(model.config).num_params() / model_shape(self.base.config).num_params()
        measured = {"left": round(left, 4), "perplexity": found, "seconds": round(seconds, 1)}
        row = {**key, **self.alike, **measured}
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.console.print(" ".join(f"{name}={value}" for name, value in row.items()))

    def pruned(self, method: Method, removed: float, seed: int) -> PreTrainedModel:
        """Return the base model less a share of its parameters."""
        dense = model_shape(self.base.config)
        model, shape, sparsity = self.base, dense, (0.0,) * len(dense.layers)
        total: tuple[LayerPlan, ...] = ()
        for number in range(method.steps):
            step = plan_step(
                self.statistics(model, method.criterion, seed, number),
                dense=dense,
                current=shape,
                sparsity=sparsity,
                target_params=round(dense.num_params() * (1 - removed * (number + 1) / method.steps)),
                steps_left=1,
                settings=PruneSettings(criterion=method.criterion, attention_unit=method.attention),
            )
            model = self.cut(model, step.layers, method if method.repair == "ridge" else None, seed, number)
            shape, sparsity = step.shape, step.sparsity
            total = tuple(map(LayerPlan.then, total, step.layers)) if total else step.layers
        return self.cut(self.base, total, method, seed, 0) if method.repair == "once" else model

    def statistics(
        self, model: PreTrainedModel, criterion: CriterionName, seed: int, step: int
    ) -> Statistics:
        """Score a model's groups on the calibration draw of a step; once for the base model."""
        key = criterion, seed
        if model is self.base and key in self.of_base:
            return self.of_base[key]
        tokens = draw_calibration(self.pool, sequences=self.sequences, seed=seed, step=step)
        found = measure(model, tokens, criterion=criterion, keep_bytes=KEEP_BYTES)
        if model is self.base:
            self.of_base[key] = found
        return found

    def cut(
        self,
        model: PreTrainedModel,
        layers: tuple[LayerPlan, ...],
        method: Method | None,
        seed: int,
        step: int,
    ) -> PreTrainedModel:
        """Return a model less what a plan removes; repaired, if a method says how."""
        if method is None:
            return prune_model(model, layers)
        tokens = draw_calibration(
            self.pool, sequences=method.tokens // self.pool.shape[1], seed=seed, step=REPAIR_DRAW + step
        )
        prefix = family_of(model.config).layers
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "proj" in name}
        repair = Repair(LayerwiseModel(model), tokens, ridge=method.ridge, keep_bytes=KEEP_BYTES)
        changes = {
            f"{prefix}.{index}.{name}": change
            for index, plan in enumerate(layers)
            for name, change in repair.layer(index, plan).items()
        }
        model.load_state_dict(before, strict=False)
        smaller = prune_model(model, layers)
        parameters = dict(smaller.named_parameters())
        for name, change in changes.items():
            parameters[name].data = parameters[name] + change.to(smaller.device)
        return smaller


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
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the calibration draws (default: 3)")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.4], help="shares to remove")
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, help="what ranks the groups")
    parser.add_argument(
        "--attention", nargs="+", default=["none"], help="prune.attention_unit (default: none)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="cuts of equal size (default: 1)")
    parser.add_argument(
        "--repairs", nargs="+", default=["none", "ridge"], help="none, ridge, once (default: none ridge)"
    )
    parser.add_argument("--ridges", type=float, nargs="+", default=[PruneSettings().repair_ridge])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768], help="tokens of the repair")
    parser.add_argument("--results", type=Path, help="file of measured rows; those in it are not run again")
    arguments = parser.parse_args()
    arguments.measure_on = arguments.measure_on or [f"passages={PASSAGES}#validation[90%:]"]
    console = Console(highlight=False, width=150)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        study = Study(arguments, Path(folder), console)
        study.run(DENSE, 0.0, 0)
        for seed, removed in itertools.product(range(arguments.seeds), arguments.removed):
            for method in methods(arguments):
                study.run(method, removed, seed)
    console.print(table(study))
    print(json.dumps(figures(study)))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the values of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().numpy())
    return found.hexdigest()[:12]


def methods(arguments: argparse.Namespace) -> Iterator[Method]:
    """Yield the rows that were asked for."""
    for kind in itertools.product(arguments.criteria, arguments.attention, arguments.steps):
        for repair in arguments.repairs:
            if repair == "none":
                yield Method(*kind)
            else:
                for tokens, ridge in itertools.product(arguments.tokens, arguments.ridges):
                    yield Method(*kind, repair, ridge, tokens)


def grouped(study: Study) -> dict[tuple[Method, float], list[dict[str, object]]]:
    """Return the rows of all seeds by method and share removed."""
    groups = defaultdict(list)
    for row in study.rows:
        method = Method(**{field.name: row[field.name] for field in dataclasses.fields(Method)})
        groups[method, row["removed"]].append(row)
    return groups


def summary(values: list[float]) -> dict[str, float | int | None]:
    """Return the mean over seeds, the standard deviation (None for one seed), and the number of seeds."""
    spread = round(stdev(values), 3) if len(values) > 1 else None
    return {"mean": round(fmean(values), 3), "spread": spread, "seeds": len(values)}


def perplexities(rows: list[dict[str, object]], text: str) -> list[float]:
    """Return what the rows measured on a text."""
    return [row["perplexity"][text] for row in rows]


def table(study: Study) -> Table:
    """Return a row a method and size, best first on the first text."""
    headers = [field.name for field in dataclasses.fields(Method)]
    shown = Table("removed", *headers, "seeds", *study.texts, "s")
    first = next(iter(study.texts))
    for (method, removed), rows in sorted(
        grouped(study).items(), key=lambda group: (group[0][1], fmean(perplexities(group[1], first)))
    ):
        cells = [f"{removed:.0%}", *map(str, dataclasses.astuple(method)), str(len(rows))]
        for name in study.texts:
            found = summary(perplexities(rows, name))
            spread = "" if found["spread"] is None else f" ± {found['spread']:,.1f}"
            cells.append(f"{found['mean']:,.1f}{spread}")
        shown.add_row(*cells, f"{fmean(row['seconds'] for row in rows):.0f}")
    return shown


def figures(study: Study) -> dict[str, object]:
    """Return the figures of the last line."""
    groups, first = grouped(study), next(iter(study.texts))
    dense = groups[DENSE, 0.0][0]["perplexity"]
    found = {"benchmark": "methods", "dense_ppl": dense}
    for removed in sorted({share for _, share in groups} - {0.0}):
        here = {method: rows for (method, share), rows in groups.items() if share == removed}
        seeds = max(map(len, here.values()))
        best = min(
            (method for method, rows in here.items() if len(rows) == seeds),
            key=lambda method: fmean(perplexities(here[method], first)),
        )
        size = f"{removed * 100:.0f}"
        found[f"best_{size}"] = str(best)
        found[f"best_ppl_{size}"] = {name: summary(perplexities(here[best], name)) for name in study.texts}
        ratios = found[f"rise_ratios_{size}"] = {}
        for method, rows in here.items():
            plain = {row["seed"]: row["perplexity"] for row in here.get(method.unrepaired(), [])}
            pairs = [(row["perplexity"], plain[row["seed"]]) for row in rows if row["seed"] in plain]
            if method.repair != "none" and pairs:
                ratios[str(method)] = {
                    name: summary([(a[name] - dense[name]) / (b[name] - dense[name]) for a, b in pairs])
                    for name in study.texts
                }
    return found


if __name__ == "__main__":
    main()
