"""How long ``adapt-pruner compare`` takes over a store of many finished runs.

The store is made up: figures by chance; layout, manifests and hashes as real runs leave them with
storage.keep=last. Measured is the whole command, with the start of Python: the table alone, with all files,
and with differences from one run. Beside the time on the clock stands that of the processor, which other work
on the machine changes less.

    python benchmarks/compare.py --runs 100 --phases 20
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo import ROOT, parser_for, table_of
from rich.console import Console

sys.path.insert(0, str(ROOT))  # for the made-up runs of the tests

from tests.support.project import command_line
from tests.support.stored_runs import write_run


def main() -> None:
    """Measure; print a table, and the seconds as one JSON object on the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--phases", type=int, default=20)
    parser.add_argument("--items", type=int, default=300, help="items of each of two tasks")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as scratch:
        store = Path(scratch, "store")
        keys = [
            write_run(
                store,
                f"run-{number:03d}",
                skill=0.5 + 0.2 * number / arguments.runs,
                phases=arguments.phases,
                items=arguments.items,
            )
            for number in range(arguments.runs)
        ]
        files = [f"--{kind}={Path(scratch, f'comparison.{kind}')}" for kind in ("csv", "markdown", "html")]
        jobs = {"table": [], "table, csv, markdown, html": files}
        jobs["all of it, against one run"] = [*files, "--against", keys[0]]
        rounds = {
            name: [_seconds(store, options) for _ in range(arguments.rounds)]
            for name, options in jobs.items()
        }
        size = Path(scratch, "comparison.html").stat().st_size
    found = {name: list(map(statistics.median, zip(*each, strict=True))) for name, each in rounds.items()}
    table = table_of(
        f"{arguments.runs} runs of {arguments.phases} phases",
        ["adapt-pruner compare"],
        ["s", "s of processor"],
    )
    for name, (clock, processor) in found.items():
        table.add_row(name, f"{clock:.2f}", f"{processor:.2f}")
    Console().print(table)
    result = {name: [round(value, 3) for value in values] for name, values in found.items()}
    result |= {"runs": arguments.runs, "phases": arguments.phases, "html_bytes": size}
    print(json.dumps(result))


def _seconds(store: Path, options: list[str]) -> tuple[float, float]:
    """Return the seconds on the clock and of the processor that one command takes."""
    command, environment = command_line("compare", store, *options)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return ended - started, processor


if __name__ == "__main__":
    main()
