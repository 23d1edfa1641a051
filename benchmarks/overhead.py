"""What a task of the pipeline costs beyond its arithmetic: imports, load, save, hashes, tracking.

Runs the demo recipe with next to no arithmetic in it (one calibration sequence, one optimizer step, one item
a benchmark) on the real model, as `adapt-pruner run` does: each task a process of its own. What a task still takes
is overhead. Then measures the parts that it is made of.

    python benchmarks/overhead.py
    python benchmarks/overhead.py output/model --repeat 5
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core.recipe import load_recipe
from pipelines.adapt_accel import build_pipeline
from pipelines.local import run_pipeline
from pipelines.progress import RunProgress

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
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
    r"^(\d\d):(\d\d):(\d\d\.\d{3}) - INFO - (Executing t|T)ask \S*'([a-z-]+?)(?:-\d+)?'\S*(?:$| finished)",
    re.MULTILINE,
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
from core.storage.manifest import fetch, publish
lap("import core")
import mlflow; lap("import mlflow")
import datasets; lap("import datasets")
import lm_eval.evaluator, lm_eval.models.huggingface; lap("import lm_eval")
folder, scratch, uri = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
from core.config import TrackingSettings
from core.tracking.mlflow import open_tracker
tracker = open_tracker(TrackingSettings(uri=uri), key="overhead", name="overhead")
tracker.start({}, {}); lap("MLflow: open the parent run")
with tracker.child(1, "parts") as child:
    child.log_metrics({"loss": 1.0})
lap("MLflow: a child run")
fetch(str(folder), scratch); lap("checkpoint: verify")
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
    """Measure, print the tables, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Measure what a pipeline task costs beyond its arithmetic.")
    parser.add_argument("model", nargs="?", help="checkpoint folder or GGUF file; default: the demo's model")
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs, of which the quickest counts (default: 3)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        runs = [task_seconds(arguments.model, Path(folder), seed) for seed in range(1 + arguments.repeat)]
        parts = part_seconds(Path(folder))
    first, warm = runs[0], runs[1:]
    tasks = {name: min(run[name] for run in warm) for name in first}
    once_s = first["resolve-base"] - tasks["resolve-base"]
    report(tasks, parts, once_s)
    slowest = max(tasks.values())
    figures = {
        "benchmark": "overhead",
        "model": arguments.model or "demo",
        "repeat": arguments.repeat,
        "cores": os.cpu_count(),
        "tasks_s": rounded(tasks),
        "parts_s": rounded(parts),
        "once_s": round(once_s, 3),
        "overhead_s_max": round(slowest, 3),
        "limit_s": LIMIT_S,
        "within_limit": slowest < LIMIT_S,
    }
    print(json.dumps(figures))


def task_seconds(model: str | None, folder: Path, seed: int) -> dict[str, float]:
    """Run the pipeline once and return the seconds of each kind of task; of two evaluations the longer."""
    overrides = [
        *NO_ARITHMETIC,
        f"seed={seed}",  # another run key: nothing is found done, but the base model is in the store
        f"storage.store={folder / 'store'}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    ]
    if model:
        overrides.append(f"model.base={Path(model).resolve()}")
    settings = load_recipe(RECIPE, tuple(overrides))
    log = folder / f"run-{seed}.log"
    progress = RunProgress(Console(stderr=True, highlight=False), phases=1)
    run_pipeline(build_pipeline(settings, local=True), folder / "kfp", log, progress)
    return read_log(log.read_text())


def read_log(text: str) -> dict[str, float]:
    """Return the seconds from kfp's start of a task to its end, process start included."""
    started: dict[str, float] = {}
    seconds: dict[str, float] = defaultdict(float)
    for hours, minutes, rest, event, task in KFP_LINE.findall(text):
        clock = int(hours) * 3600 + int(minutes) * 60 + float(rest)
        if event == "T":
            seconds[task] = max(seconds[task], (clock - started[task]) % 86_400)
        else:
            started[task] = clock
    return dict(seconds)


def part_seconds(folder: Path) -> dict[str, float]:
    """Measure the parts of a task's overhead one by one, in a process of their own."""
    (base,) = (folder / "store" / "bases").iterdir()
    (folder / "parts").mkdir()
    command = [sys.executable, "-c", PARTS, base, folder / "parts", f"sqlite:///{folder / 'mlflow.db'}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def report(tasks: dict[str, float], parts: dict[str, float], once_s: float) -> None:
    """Print what was measured as tables."""
    console = Console(highlight=False)
    for title, figures in (("Overhead of a task", tasks), ("What it is made of", parts)):
        table = Table("", title=title, title_justify="left")
        table.add_column("seconds", justify="right")
        for name, seconds in figures.items():
            over = title == "Overhead of a task" and seconds >= LIMIT_S
            table.add_row(name, f"{seconds:.2f}", style="red" if over else "")
        console.print(table)
    console.print(f"Once a base model, to take it up and to make the MLflow database: {once_s:.1f} s")


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Round to milliseconds."""
    return {name: round(value, 3) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
