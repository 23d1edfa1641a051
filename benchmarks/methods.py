"""Quality of pruned models without training, method beside method: equal size, equal calibration text.

Cuts MLPs of the demo's model to 80 and 60 % of its parameters in one step, by each criterion, without repair
and with it, with several seeds of the calibration draws. Measures perplexity on texts that nothing was
calibrated on, one of the same domain and one or more of others: the first decides. Takes hours on a laptop;
--results keeps the measurements in a file, from which a stopped run resumes, and to which other criteria,
ridges and numbers of tokens can be added in later sittings.

    python benchmarks/methods.py --measure-on c4=c4.jsonl --measure-on wikitext2=wikitext2.txt
    python benchmarks/methods.py --criteria wanda_sp --seeds 1 --ridges 0.03 0.1 0.3 --results methods.jsonl
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from quality import DEMO_MODEL, PASSAGES, calibration_pool, held_out_windows
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from core.bases.importing import import_base
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
from core.settings.model import ModelSettings
from core.settings.prune import CriterionName, PruneSettings

CRITERIA = ("taylor_l1", "activation_l2", "wanda_sp", "fluctuation")
KEEP_BYTES = 2 * 10**9
REPAIR_DRAW = 999


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        criterion: What ranks the channels.
        repair: ``none`` or ``ridge``.
        ridge: Strength of the ridge; 0 without repair.
        tokens: Tokens that the repair is computed from; 0 without.
    """

    criterion: str = ""
    repair: str = "none"
    ridge: float = 0.0
    tokens: int = 0


DENSE = Method()


class Study:
    """What all rows share, and the rows that are measured."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console) -> None:
        """Load the model, the texts, and what is measured already."""
        directory = Path(arguments.model or "")
        if arguments.model is None:
            directory = Path(import_base(ModelSettings(base=DEMO_MODEL), str(folder / "store"))[0])
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
        }
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
        row = {**key, **self.alike, "perplexity": found, "seconds": round(seconds, 1)}
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.console.print(" ".join(f"{name}={value}" for name, value in row.items()))

    def pruned(self, method: Method, removed: float, seed: int) -> PreTrainedModel:
        """Return the base model less a share of its parameters."""
        dense = model_shape(self.base.config)
        step = plan_step(
            self.statistics(method.criterion, seed),
            dense=dense,
            current=dense,
            sparsity=(0.0,) * len(dense.layers),
            target_params=round(dense.num_params() * (1 - removed)),
            steps_left=1,
            settings=PruneSettings(criterion=method.criterion, attention_unit="none"),
        )
        changes = self.changes(method, step.layers, seed)
        model = prune_model(self.base, step.layers)
        parameters = dict(model.named_parameters())
        for name, change in changes.items():
            parameters[name].data = parameters[name] + change.to(model.device)
        return model

    @functools.cache  # noqa: B019 (one study a process)
    def statistics(self, criterion: CriterionName, seed: int) -> Statistics:
        """Score the base model's groups on the calibration draw of a seed."""
        tokens = draw_calibration(self.pool, sequences=self.sequences, seed=seed, step=0)
        return measure(self.base, tokens, criterion=criterion, keep_bytes=KEEP_BYTES)

    def changes(self, method: Method, layers: tuple[LayerPlan, ...], seed: int) -> dict[str, Tensor]:
        """Return what a repair adds to the weights that stay."""
        if method.repair == "none":
            return {}
        sequences = min(method.tokens // self.pool.shape[1], len(self.pool))
        tokens = draw_calibration(self.pool, sequences=sequences, seed=seed, step=REPAIR_DRAW)
        prefix = family_of(self.base.config).layers
        kept = {name: tensor.clone() for name, tensor in self.base.state_dict().items() if "proj" in name}
        repair = Repair(LayerwiseModel(self.base), tokens, ridge=method.ridge, keep_bytes=KEEP_BYTES)
        found = {
            f"{prefix}.{index}.{name}": change
            for index, plan in enumerate(layers)
            for name, change in repair.layer(index, plan).items()
        }
        self.base.load_state_dict(kept, strict=False)
        return found


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Compare pruning methods without training.")
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
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, help="what ranks the channels")
    parser.add_argument("--ridges", type=float, nargs="+", default=[PruneSettings().repair_ridge])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768], help="tokens of the repair")
    parser.add_argument("--results", type=Path, help="file of measured rows; those in it are not run again")
    arguments = parser.parse_args()
    arguments.measure_on = arguments.measure_on or [f"passages={PASSAGES}#validation[90%:]"]
    console = Console(highlight=False, width=150)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        study = Study(arguments, Path(folder), console)
        study.run(DENSE, 0.0, 0)
        for seed in range(arguments.seeds):
            for removed in arguments.removed:
                for criterion in arguments.criteria:
                    study.run(Method(criterion), removed, seed)
                    for tokens in arguments.tokens:
                        for ridge in arguments.ridges:
                            study.run(Method(criterion, "ridge", ridge, tokens), removed, seed)
    console.print(table(study))
    print(json.dumps(figures(study)))


def grouped(study: Study) -> dict[tuple[Method, float], list[dict[str, object]]]:
    """Return the rows of all seeds by method and share removed."""
    groups = defaultdict(list)
    for row in study.rows:
        method = Method(**{field.name: row[field.name] for field in dataclasses.fields(Method)})
        groups[method, row["removed"]].append(row)
    return groups


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation over seeds (0 for one)."""
    return round(fmean(values), 3), round(stdev(values), 3) if len(values) > 1 else 0.0


def table(study: Study) -> Table:
    """Return a row a method and size, best first on the first text."""
    shown = Table("removed", "criterion", "repair", "ridge", "tokens", "seeds", *study.texts, "s")
    first = next(iter(study.texts))
    for (method, removed), rows in sorted(
        grouped(study).items(), key=lambda g: (g[0][1], fmean(row["perplexity"][first] for row in g[1]))
    ):
        cells = (
            "{:,.2f} ± {:,.2f}".format(*mean_and_spread([row["perplexity"][name] for row in rows]))
            for name in study.texts
        )
        values = [f"{removed:.0%}", *map(str, dataclasses.astuple(method)), str(len(rows)), *cells]
        shown.add_row(*values, f"{fmean(row['seconds'] for row in rows):.0f}")
    return shown


def figures(study: Study) -> dict[str, object]:
    """Return the figures of the last line: the best of each size, and what a repair leaves of the rise."""
    groups, found = grouped(study), {"benchmark": "methods"}
    dense = groups[DENSE, 0.0][0]["perplexity"]
    first = next(iter(study.texts))
    for removed in sorted({share for _, share in groups} - {0.0}):
        here = {method: rows for (method, share), rows in groups.items() if share == removed}
        best = min(here, key=lambda method: fmean(row["perplexity"][first] for row in here[method]))
        size = f"{removed * 100:.0f}"
        found[f"best_{size}"] = dataclasses.asdict(best)
        for name in study.texts:
            found[f"best_ppl_{size}_{name}"] = mean_and_spread(
                [row["perplexity"][name] for row in here[best]]
            )
        for method, rows in here.items():
            plain = {row["seed"]: row for row in here.get(Method(method.criterion), [])}
            for name in study.texts if method.repair != "none" else ():
                ratios = [
                    (row["perplexity"][name] - dense[name])
                    / (plain[row["seed"]]["perplexity"][name] - dense[name])
                    for row in rows
                    if row["seed"] in plain
                ]
                label = f"{method.criterion}_{method.ridge}_{method.tokens}"
                found[f"rise_ratio_{size}_{name}_{label}"] = mean_and_spread(ratios) if ratios else None
    return found


if __name__ == "__main__":
    main()
