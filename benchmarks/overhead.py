"""Overhead of the pipeline's tasks beyond their arithmetic: imports, load, save, hashes, tracking.

Runs the demo recipe with almost no arithmetic (one calibration sequence, one optimizer step, one item per
benchmark) on the real model, as `adapt-pruner run` does: each task in its own process. The remaining time of
a task is overhead, except what calibrate and recover-train do once per weight. Then measures the parts of
this overhead. Run it on an idle machine: if the seconds are far above the CPU seconds, it was busy.

Then measures the cost of waiting threads and of their number: the demo's benchmark items are answered with
torch's defaults and with the settings of `core.machine.cores`, alone, beside a process that keeps all cores
busy, and under CPU quotas (of a control group if this user may create one, otherwise by affinity).

    python benchmarks/overhead.py
    python benchmarks/overhead.py output/model --repeat 5
    python benchmarks/overhead.py --only threads
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import RECIPE, table_of
from rich.console import Console
from threads import measure_threads

from core.settings.recipe import load_recipe
from pipelines.adapt_accel import build_pipeline
from pipelines.local.progress import RunProgress
from pipelines.local.run import run_pipeline

LIMIT_S = 6.0
NO_ARITHMETIC = (
    "prune.target=90%",
    "prune.phases=1",
    "prune.steps_per_phase=1",
    "calibration.sequences=1",
    "calibration.micro_batch=1",
    "calibration.sequence_length=8",
    "calibration.pool_documents=64",
    "training.tokens=8",
    "training.sequence_length=8",
    "training.global_batch=1",
    "training.micro_batch=1",
    "evaluation.limit=1",
    "evaluation.perplexity_windows=1",
    "evaluation.perplexity_length=8",
)
KFP_LINE = re.compile(
    r" - INFO - (Executing t|T)ask \S*'([a-z-]+?)(?:-\d+)?'\S*(?:$| finished)", re.MULTILINE
)
PARTS = """
import json, sys, time
from pathlib import Path

seconds, started = {}, time.perf_counter()
def lap(name):
    global started
    seconds[name] = time.perf_counter() - started
    started = time.perf_counter()

import torch; lap("import torch")
import transformers; lap("import transformers")
from core.model.build import load_model
from core.model.checkpoint import save_model
from core.storage.publication import open_publication, publish
lap("import core")
import mlflow; lap("import mlflow")
import datasets; lap("import datasets")
import lm_eval.evaluator, lm_eval.models.huggingface; lap("import lm_eval")
folder, scratch, uri = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
from core.settings.storage import TrackingSettings
from core.tracking.mlflow import open_tracker
tracker = open_tracker(TrackingSettings(uri=uri), key="overhead", name="overhead")
tracker.start({}, {}); lap("MLflow: open the parent run")
with tracker.child(1, "parts") as child:
    child.log_metrics({"loss": 1.0})
lap("MLflow: a child run")
open_publication(str(folder)).fetch(scratch); lap("checkpoint: verify")
model = load_model(folder, dtype=torch.float32)
for parameter in model.parameters():
    parameter.sum()  # reads what is mapped
lap("checkpoint: load")
(scratch / "out").mkdir()
save_model(model, scratch / "out", companions=folder, provenance={}); lap("checkpoint: save")
publish(scratch / "out", str(scratch / "published")); lap("checkpoint: hash and publish")
print(json.dumps(seconds))
"""


def main() -> None:
    """Measure; print the tables, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Measure what a pipeline task costs beyond its arithmetic.")
    parser.add_argument("model", nargs="?", help="checkpoint folder or GGUF file; default: the demo's model")
    parser.add_argument("--repeat", type=int, default=3, help="runs; the fastest counts (default: 3)")
    parser.add_argument("--only", choices=("tasks", "threads"), help="measure only this")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "benchmark": "overhead",
        "model": arguments.model or "demo",
        "repeat": arguments.repeat,
        "cores": os.cpu_count(),
    }
    if arguments.only != "threads":
        figures |= measure_tasks(arguments.model, arguments.repeat)
    if arguments.only != "tasks":
        figures["threads"] = measure_threads(arguments.model, arguments.repeat)
    print(json.dumps(figures))


def measure_tasks(model: str | None, repeat: int) -> dict[str, Any]:
    """Measure the overhead of each task, print it, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        runs = [task_seconds(model, Path(folder), seed) for seed in range(1 + repeat)]
        parts = part_seconds(Path(folder))
    first, warm = runs[0], runs[1:]
    tasks = {name: min(run[name] for run in warm) for name in first}  # (seconds, CPU seconds)
    once_s = first["resolve-base"][0] - tasks["resolve-base"][0]
    report(tasks, parts, once_s)
    slowest = max(seconds for seconds, _ in tasks.values())
    return {
        "tasks_s": {name: round(seconds, 3) for name, (seconds, _) in tasks.items()},
        "tasks_cpu_s": {name: round(cpu, 3) for name, (_, cpu) in tasks.items()},
        "parts_s": {name: round(seconds, 3) for name, seconds in parts.items()},
        "once_s": round(once_s, 3),
        "overhead_s_max": round(slowest, 3),
        "limit_s": LIMIT_S,
        "within_limit": slowest < LIMIT_S,
    }


class Stopwatch(RunProgress):
    """Progress display that also times each kind of task, from the start of its process to its end.

    Attributes:
        seconds: Kind of task to (seconds, CPU seconds); the longer one of two evaluations.
    """

    def __init__(self, console: Console) -> None:
        """Show the run on ``console``."""
        super().__init__(console, phases=1)
        self.seconds: dict[str, tuple[float, float]] = {}
        self._started = (0.0, 0.0)

    def write(self, text: str) -> int:
        """Handle output of kfp or a task."""
        for event, task in KFP_LINE.findall(text):
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            now = (time.monotonic(), children.ru_utime + children.ru_stime)
            if event == "T":
                spent = (now[0] - self._started[0], now[1] - self._started[1])
                self.seconds[task] = max(spent, self.seconds.get(task, spent))
            self._started = now
        return super().write(text)


def task_seconds(model: str | None, folder: Path, seed: int) -> dict[str, tuple[float, float]]:
    """Run the pipeline once and return (seconds, CPU seconds) of each kind of task."""
    overrides = [
        *NO_ARITHMETIC,
        f"seed={seed}",  # another run key: nothing is found done, but the base model is in the store
        f"storage.store={folder / 'store'}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    ]
    if model:
        overrides.append(f"model.base={Path(model).resolve()}")
    settings = load_recipe(RECIPE, tuple(overrides))
    stopwatch = Stopwatch(Console(stderr=True, highlight=False))
    run_pipeline(build_pipeline(settings, local=True), folder / "kfp", folder / "run.log", stopwatch)
    return stopwatch.seconds


def part_seconds(folder: Path) -> dict[str, float]:
    """Measure the parts of a task's overhead one by one, in a separate process."""
    (base,) = (folder / "store" / "bases").iterdir()
    (folder / "parts").mkdir()
    command = [sys.executable, "-c", PARTS, base, folder / "parts", f"sqlite:///{folder / 'mlflow.db'}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def report(tasks: dict[str, tuple[float, float]], parts: dict[str, float], once_s: float) -> None:
    """Print the measurements as tables."""
    console = Console(highlight=False)
    table = table_of("Overhead of a task", ["task"], ["seconds", "CPU seconds"])
    for name, (seconds, cpu) in tasks.items():
        table.add_row(name, f"{seconds:.2f}", f"{cpu:.2f}", style="" if seconds < LIMIT_S else "red")
    console.print(table)
    table = table_of("Its parts", ["part"], ["seconds"])
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds:.2f}")
    console.print(table)
    console.print(f"Once per base model, to import it and create the MLflow database: {once_s:.1f} s")


if __name__ == "__main__":
    main()
