"""What preemption costs: a run whose steps are killed by SIGKILL at random moments, as pods are deleted.

Each step of the demo's recipe is a process, which is started again as Argo does when it has been killed. The
time to a kill is drawn from an exponential distribution; kills end after a while, and the run then goes on to
its end. Beside it, the same run is computed undisturbed, and every published file that does not tell how long
something took is compared.

Lost is what a killed process had done that the next one does again (layers, tokens, answers, whatever the
step counts: items that were computed beyond those that are needed, times the mean time of an item), the time
from its last item to its end, and all of an attempt that counts nothing. Starting again (imports, fetching,
loading) is shown apart.

    python benchmarks/preemption.py
    python benchmarks/preemption.py --every 20 --minutes 5 --small --set training.tokens=200k
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from demo import RECIPE, ROOT, parser_for, table_of
from rich.console import Console

sys.path.insert(0, str(ROOT))  # for the small project of the tests

from core.progress import Progress
from core.storage.publication import find_publication
from core.storage.store import open_store
from core.training.parallel.launch import end_with_parent
from tests.support.project import Artifact, make_project, recipe_with, resolve

TIMED = {"report.json", "record.json", "report.html", "README.md"}
"""Files that tell how long something took."""
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 32}
STANDSTILL = re.compile(r"stood still for ([0-9.]+) s")
PRELOAD = ["tests.support.project", "core.steps", "core.training.recover", "core.pruning.planning", "lm_eval"]

Task = tuple[str, str, dict[str, Any]]
"""Name, the module's function of core.steps, and its arguments; those that are paths are artifacts."""


@dataclass
class Account:
    """What the attempts at a step have taken.

    Attributes:
        attempts: How many.
        seconds: Of all.
        restart_s: From the start of an attempt after the first one, to its first item.
        tail_s: From the last item of an attempt that was killed to its end.
        item_s: Seconds and number of items that were computed, by their kind.
        needed: Items of each kind.
        standstill_s: For saving, as logged.
    """

    attempts: int = 0
    seconds: float = 0.0
    restart_s: float = 0.0
    tail_s: float = 0.0
    item_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    needed: dict[str, float] = field(default_factory=dict)
    standstill_s: float = 0.0

    @property
    def lost_s(self) -> float:
        """Seconds of work that was done in vain."""
        again = (
            seconds * max(0.0, 1 - self.needed.get(kind, done) / done)
            for kind, (seconds, done) in self.item_s.items()
        )
        return self.tail_s + sum(again)


def main() -> None:
    """Run, and print a table and the figures."""
    parser = parser_for(__doc__)
    parser.add_argument("--every", type=float, default=180.0, help="mean seconds to a kill (default: 180)")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long there are kills (default: 60)")
    parser.add_argument("--small", action="store_true", help="a small random model and two phases of it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to work, and to find the undisturbed run again")
    arguments = parser.parse_args()
    if arguments.every <= 0:
        parser.error(f"--every={arguments.every} must be above 0: the mean seconds from one kill to the next")
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as temporary:
        folder = arguments.folder or Path(temporary)
        recipe = recipe_of(folder, arguments.small, arguments.set)
        stores = {name: str(folder / name) for name in ("undisturbed", "killed")}
        undisturbed = undisturbed_run(recipe, stores["undisturbed"], folder)
        kills = moments(arguments.every, 60 * arguments.minutes, arguments.seed)
        killed = run(recipe, stores["killed"], folder / "log-killed", kills)
        expected, found = (content(store) for store in stores.values())
    for name, account in killed.items():
        account.needed = {kind: done for kind, (_, done) in undisturbed[name].item_s.items()}
    print(json.dumps(figures(arguments, undisturbed, killed) | differences(expected, found)))


def recipe_of(folder: Path, small: bool, changes: list[str]) -> dict[str, Any]:
    """Return the recipe of the demo, or of a small project that is made in ``folder``."""
    os.chdir(ROOT)
    recipe = yaml.safe_load(RECIPE.read_text())
    if small:
        from tests.conftest import define_tokenizer, tokenizer_of

        project = make_project(folder / "project", tokenizer_of(define_tokenizer()), SMALL)
        recipe = recipe_with({"calibration.sequences": 24, "training.tokens": "96k"})
        os.chdir(project)
    for change in changes:
        name, _, value = change.partition("=")
        *sections, key = name.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = yaml.safe_load(value)
    recipe.pop("tracking", None)
    return recipe


def undisturbed_run(recipe: dict[str, Any], store: str, folder: Path) -> dict[str, Account]:
    """Return what the steps have taken where nothing is killed; such a run in ``folder`` is not repeated."""
    kept = folder / "undisturbed.json"
    if kept.exists() and (known := json.loads(kept.read_text()))["recipe"] == recipe:
        return {name: Account(**account) for name, account in known["accounts"].items()}
    accounts = run(recipe, store, folder / "log-undisturbed", iter(()))
    taken = {name: vars(account) for name, account in accounts.items()}
    kept.write_text(json.dumps({"recipe": recipe, "accounts": taken}))
    return accounts


def moments(every_s: float, last_s: float, seed: int) -> Iterator[float]:
    """Yield the seconds to each next kill, for a while; an iterator that is at its end kills no more."""
    chance, end = random.Random(seed), time.monotonic() + last_s
    while (wait := chance.expovariate(1 / every_s)) < end - time.monotonic():
        yield wait


def tasks(recipe: dict[str, Any], do: Callable[[Task], Any], artifacts: Path) -> None:
    """Have the steps of a run done, in their order."""
    run, base_uri = resolve(recipe)
    common: dict[str, Any] = {"run": run}
    data_uri = do(("prepare-data", "prepare_data.run_prepare_data", common | {"base_uri": base_uri}))

    def evaluate(phase: int, uri: str) -> None:
        given = {name: artifacts / name for name in ("summary", "picture")}
        given |= common | {"phase": phase, "checkpoint_uri": uri, "data_uri": data_uri}
        do((f"evaluate {phase}", "evaluate.run_evaluate", given))

    evaluate(0, base_uri)
    checkpoint = base_uri
    for phase in range(1, recipe["prune"]["phases"] + 1):
        given = common | {"phase": phase, "checkpoint_uri": checkpoint, "data_uri": data_uri}
        do((f"calibrate {phase}", "calibrate.run_calibrate", given | {"statistics": artifacts / "s"}))
        do((f"score-layers {phase}", "score_layers.run_score_layers", given | {"plan": artifacts / "p"}))
        model = {"model": artifacts / "m"}
        pruned = do((f"prune-step {phase}", "prune_step.run_prune_step", given | model))
        given |= model | {"checkpoint_uri": pruned}
        checkpoint = do((f"recover-train {phase}", "recover_train.run_recover_train", given))
        evaluate(phase, checkpoint)
    given = {"checkpoint_uri": checkpoint} | {n: artifacts / n for n in ("result", "report", "model")}
    do(("publish", "publish.run_publish", common | given))


def run(recipe: dict[str, Any], store: str, log: Path, kills: Iterator[float]) -> dict[str, Account]:
    """Run all steps, each as a process, and return what each has taken."""
    recipe = {**recipe, "storage": {**recipe.get("storage", {}), "store": store}}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    accounts: dict[str, Account] = {}
    console = Console(stderr=True, highlight=False)
    due = [next(kills, None)]  # seconds of work until the next kill

    def do(task: Task) -> Any:
        account = accounts.setdefault(task[0], Account())
        while True:
            receiver, sender = context.Pipe(duplex=False)
            events = log.with_name(f"{log.name}-events")
            events.unlink(missing_ok=True)
            process = context.Process(target=attempt, args=(task, log, events, sender, os.getcwd()))
            began = time.time()
            process.start()
            sender.close()
            process.join(due[0])
            killed = process.is_alive()
            if killed:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            ended = time.time()
            add_events(account, events, began, ended, killed)
            if killed:
                console.print(f"{task[0]}: killed after {ended - began:.0f} s")
                due[0] = next(kills, None)
                continue
            assert process.exitcode == 0, f"{task[0]} has failed: see {log}"
            due[0] = None if due[0] is None else max(0.1, due[0] - (ended - began))
            return receiver.recv()

    tasks(recipe, do, log.with_name(f"{log.name}-artifacts"))
    return accounts


def attempt(task: Task, log: Path, events: Path, sender: Any, folder: str) -> None:
    """Be the process of a step: log, and note each item that it counts."""
    import importlib

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.chdir(folder)
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logging.getLogger("core").addHandler(handler)
    logging.getLogger("core").setLevel(logging.INFO)
    file = os.open(events, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(kind: str, value: float) -> None:
        os.write(file, json.dumps([time.time(), kind, value]).encode() + b"\n")

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := STANDSTILL.search(record.getMessage()):
                note("standstill", float(found[1]))

    logging.getLogger("core").addHandler(Watch())
    add = Progress.add

    def noting(self: Progress, items: int = 1, text: str = "") -> None:
        add(self, items, text)
        note(self._what, items)

    Progress.add = noting
    _, function, given = task
    module, _, name = function.rpartition(".")
    step = getattr(importlib.import_module(f"core.steps.{module}"), name)
    sender.send(step(**{key: Artifact(v) if isinstance(v, Path) else v for key, v in given.items()}))


def add_events(account: Account, events: Path, began: float, ended: float, killed: bool) -> None:
    """Add what an attempt has noted."""
    lines = events.read_text().splitlines() if events.exists() else []
    noted = [json.loads(line) for line in lines if line.endswith("]")]
    account.standstill_s += sum(value for _, kind, value in noted if kind == "standstill")
    last = None
    for moment, kind, items in noted:
        if kind == "standstill":
            continue
        if last is None:  # the first item comes with all that goes before
            account.restart_s += moment - began if account.attempts else 0.0
        else:
            account.item_s[kind][0] += moment - last
        account.item_s[kind][1] += items
        last = moment
    if killed:
        account.tail_s += ended - (began if last is None else last)
    account.attempts += 1
    account.seconds += ended - began


def content(store: str) -> dict[str, str]:
    """Return the sha256 of every published file that does not tell how long something took."""
    found = {}
    for key in open_store(store).list("runs/"):
        place, _, name = key.rpartition("/")
        if name == "MANIFEST.json":
            published = find_publication(f"{store}/{place}")
            assert published is not None
            found |= {
                f"{place}/{entry.path}": entry.sha256
                for entry in published.manifest.files
                if entry.path not in TIMED
            }
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> dict[str, Any]:
    """Return whether both runs have published the same."""
    differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    return {"files": len(expected), "differing": differing[:5], "bit_equal": not differing}


def figures(
    arguments: argparse.Namespace, undisturbed: dict[str, Account], killed: dict[str, Account]
) -> dict[str, Any]:
    """Print what each step has taken, and return the figures."""
    table = table_of(
        "Killed at random moments", ["step"], ["undisturbed", "killed", "kills", "lost", "again"]
    )
    totals: dict[str, float] = defaultdict(float)
    for name, account in killed.items():
        table.add_row(
            name,
            *(f"{undisturbed[name].seconds:.0f} s", f"{account.seconds:.0f} s", str(account.attempts - 1)),
            *(f"{account.lost_s:.1f} s", f"{account.restart_s:.1f} s"),
        )
        totals["seconds"] += account.seconds
        totals["lost"] += account.lost_s
        totals["restart"] += account.restart_s
        totals["kills"] += account.attempts - 1
        if name.startswith("recover-train"):
            totals["training"] += account.seconds
            totals["standstill"] += account.standstill_s
    Console(stderr=True, highlight=False).print(table)
    return {
        "benchmark": "preemption",
        "model": "small" if arguments.small else "demo",
        "every_s": arguments.every,
        "minutes": arguments.minutes,
        "kills": totals["kills"],
        "undisturbed_s": round(sum(account.seconds for account in undisturbed.values()), 1),
        "killed_s": round(totals["seconds"], 1),
        "lost_share": round(totals["lost"] / totals["seconds"], 4),
        "restart_share": round(totals["restart"] / totals["seconds"], 4),
        "saving_share": round(totals["standstill"] / max(totals["training"], 1e-9), 4),
    }


if __name__ == "__main__":
    main()
