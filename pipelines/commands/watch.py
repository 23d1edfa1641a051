"""``adapt-pruner watch``: how far runs have come, wherever they run."""

import time
from typing import TYPE_CHECKING

import click

from pipelines.commands.compare import finder_of, registered, where_options
from pipelines.commands.console import example, printable
from pipelines.commands.submit import pause_of

if TYPE_CHECKING:
    from core.runs.finding import StoredRun


@click.command(
    epilog=example(
        "adapt-pruner watch output/store",
        "adapt-pruner watch s3://models/pruning/runs/3f9ac1d27be0 --every 1min",
    )
)
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@where_options
@click.option("--every", default="10s", show_default=True, help="How often to look.")
@click.option("--once", is_flag=True, help="Look once.")
def watch(runs: tuple[str, ...], stores: tuple[str, ...], every: str, once: bool, tracking_uri: str) -> None:
    """Follow runs in a store: phase, step, loss, time left.

    RUN is a store, STORE/runs/KEY, or what the command compare takes. A line is printed when something has
    changed. It ends when no run is worked on. Optimizer steps and the loss are those of the last training
    state (training.save_every); the time left follows from the steps that are done.
    """
    from core.runs.finding import stored_runs
    from core.storage.store import open_store

    poll_s = pause_of(every)
    wanted = [registered(run, tracking_uri) for run in runs]
    finder = finder_of(wanted, stores)
    found = finder.select(wanted)
    said: dict[str, str] = {}
    while True:
        for each in found:
            line = _line(each)
            if said.get(each.place) != line:
                said[each.place] = line
                click.echo(printable(line))
        if once or not any(each.overview.state == "running" for each in found):
            return
        time.sleep(poll_s)
        found = [again for each in found for again in stored_runs(open_store(each.store), each.overview.key)]


def _line(stored: "StoredRun") -> str:
    """Return where a run stands, in one line."""
    from core.quantities import seconds_text
    from core.steps.watching import watched

    seen, now = stored.overview, watched(stored)
    name = f"{seen.name} {seen.key}"
    if now is None or not now.step:
        return f"{name}  {seen.state}"
    step = f"phase {now.phase} of {seen.phases}, {now.step}" if now.phase else f"before phase 1, {now.step}"
    parts = [f"{seen.state}, {100 * now.share:.0f} %", step]
    if now.trained:
        parts.append(f"optimizer step {now.trained:,} of {now.to_train:,}")
    if now.loss is not None:
        parts.append(f"loss {now.loss:.3f}")
    if now.seconds_left is not None:
        parts.append(f"about {seconds_text(now.seconds_left)} of work left")
    return f"{name}  {'; '.join(parts)}"
