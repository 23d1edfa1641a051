"""Effect of the settings of `core.machine.cores`: benchmark items answered with and without them.

Part of `benchmarks/overhead.py`, which runs it.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import RECIPE, ROOT, model_folder, table_of
from rich.console import Console

from core.machine.control_groups import control_groups

ITEMS = 15  # of ARC-easy, four answers each
PERIOD_US = 100_000

ANSWER = """
import dataclasses, json, sys, time
from pathlib import Path

folder, recipe, items, rounds, ours = sys.argv[1:]
if ours == "ours":
    from core.machine.cores import use_own_cores
    use_own_cores()
import torch
from core.evaluation.benchmarks import evaluate_tasks
from core.model.build import load_model, load_tokenizer
from core.settings.recipe import load_recipe

settings = load_recipe(Path(recipe)).evaluation
settings = dataclasses.replace(
    settings, tasks=("arc_easy",), task_data={"arc_easy": settings.task_data["arc_easy"]}, limit=int(items)
)
model, tokenizer = load_model(Path(folder), dtype=torch.float32), load_tokenizer(Path(folder))
evaluate_tasks(model, tokenizer, dataclasses.replace(settings, limit=1))
seconds = []
for _ in range(int(rounds)):
    started = time.perf_counter()
    evaluate_tasks(model, tokenizer, settings)
    seconds.append(time.perf_counter() - started)
print(json.dumps({"threads": torch.get_num_threads(), "seconds": seconds}))
"""
BUSY = """
import torch
matrix = torch.randn(512, 512)
while True:
    matrix @ matrix
"""


@dataclass(frozen=True)
class Situation:
    """Conditions for answering items: a CPU quota in cores (0: none), and whether a busy process competes."""

    name: str
    quota: float = 0.0
    busy: bool = False


def measure_threads(model: str | None, rounds: int) -> dict[str, Any]:
    """Measure each situation without and with our settings; print a table and return the figures."""
    cores = len(os.sched_getaffinity(0))
    situations = [Situation("alone"), Situation("beside a busy process", busy=True)]
    situations += [Situation(f"quota of {quota:g}", quota) for quota in (2.0, 1.5, 1.0) if quota <= cores]
    figures: dict[str, Any] = {"items": ITEMS, "situations": {}}
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as scratch:
        folder = model_folder(model, Path(scratch))
        for situation in situations:
            plain, ours = (answer(folder, situation, rounds, ours=ours) for ours in (False, True))
            figures["situations"][situation.name] = {
                "limited_by": plain["limited_by"],
                "plain_s": round(plain["median_s"], 2),
                "plain_threads": plain["threads"],
                "ours_s": round(ours["median_s"], 2),
                "ours_threads": ours["threads"],
                "ratio": round(plain["median_s"] / ours["median_s"], 2),
            }
    report(figures)
    return figures


def answer(folder: Path, situation: Situation, rounds: int, *, ours: bool) -> dict[str, Any]:
    """Answer the items in a separate process; return its number of threads and its median seconds."""
    arguments = [folder, RECIPE, ITEMS, rounds, "ours" if ours else ""]
    words = [sys.executable, "-c", ANSWER, *map(str, arguments)]
    with limited(situation.quota) as (prefix, limited_by), busy_process(situation.busy):
        done = subprocess.run(
            [*prefix, *words], env=environment(), stdout=subprocess.PIPE, text=True, check=True
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"median_s": statistics.median(found["seconds"]), "limited_by": limited_by}


def environment() -> dict[str, str]:
    """Return the environment without thread settings of the user."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return kept | {"PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """Keep all cores busy with a process of the same priority; its threads spin as torch's do by default."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY], env=environment())
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def limited(quota: float) -> Iterator[tuple[list[str], str]]:
    """Yield the words that start a command under a CPU quota, and the name of the limit."""
    if not quota:
        yield [], ""
        return
    for parent in reversed(control_groups("cpu")):  # the root may be divided; others hold processes
        group = parent / f"adapt-pruner-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if set_quota(group, int(quota * PERIOD_US)):
                yield ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"], str(parent)
                return
        finally:
            group.rmdir()
    cpus = sorted(os.sched_getaffinity(0))[: max(1, int(quota))]
    yield ["taskset", "--cpu-list", ",".join(map(str, cpus))], "affinity"


def set_quota(group: Path, quota_us: int) -> bool:
    """Limit a new control group; return whether that is possible."""
    for name, text in {"cpu.max": f"{quota_us} {PERIOD_US}", "cpu.cfs_quota_us": str(quota_us)}.items():
        if (group / name).exists():
            (group / name).write_text(text)
            return True
    return False


def report(figures: dict[str, Any]) -> None:
    """Print the measurements as a table."""
    title = f"{4 * ITEMS} answers, seconds (threads)"
    table = table_of(title, ["situation"], ["torch's defaults", "ours", "ratio"])
    for name, found in figures["situations"].items():
        table.add_row(
            f"{name} ({found['limited_by']})" if found["limited_by"] else name,
            f"{found['plain_s']:.1f} ({found['plain_threads']})",
            f"{found['ours_s']:.1f} ({found['ours_threads']})",
            f"{found['ratio']:.2f}",
        )
    Console(highlight=False).print(table)
