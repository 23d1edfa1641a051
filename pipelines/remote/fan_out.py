"""The cells of an experiment on Kubeflow Pipelines: a run each, a few at a time.

A run is named after its cell's settings, so that a repeated command finds the runs of one that was killed.
Cells that are compiled alike share a version of the pipeline; all else reaches a run by its parameters.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import SettingsError, refuse
from core.experiments.definition import Cell
from core.settings.parameters import compiled_for, parameters_of
from pipelines.remote.client import Client, named, pages
from pipelines.remote.following import ENDED, ask
from pipelines.remote.submission import (
    Package,
    Submission,
    compile_package,
    experiment_id,
    out_of_reach,
    start,
)


@dataclass(kw_only=True)
class _Active:
    """A run that has not ended."""

    cell: Cell
    run_id: str
    tasks: dict[str, str]
    said: str = ""
    """The trouble that was reported last."""


def submissions_of(
    name: str, cells: Sequence[Cell], service_account: str
) -> tuple[dict[str, Submission], dict[str, str]]:
    """Compile what the cells need.

    Returns:
        The key of each cell to what its run is started with, and of each that a cluster cannot run to the
        reason.

    Raises:
        SettingsError: If a setting names a place of this machine.
    """
    refuse(dict.fromkeys(problem for cell in cells for problem in out_of_reach(cell.settings)))
    packages: dict[str, Package] = {}
    ready, refused = dict[str, Submission](), dict[str, str]()
    for cell in cells:
        settings = cell.settings
        compiled = compiled_for(settings, phases=settings.prune.phases)
        alike = json.dumps([compiled, dataclasses.asdict(settings.cluster)], sort_keys=True)
        try:
            if alike not in packages:
                packages[alike] = compile_package(dataclasses.replace(settings, name=name))
        except SettingsError as error:
            refused[cell.key] = str(error)
            continue
        ready[cell.key] = Submission(
            settings=settings,
            package=packages[alike],
            arguments=parameters_of(settings),
            service_account=service_account or None,
        )
    return ready, refused


def fan_out(
    client: Client,
    cells: Sequence[Cell],
    submissions: dict[str, Submission],
    *,
    experiment: str,
    parallel: int,
    poll_s: float,
    trust_runs: bool,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Start runs, and follow them until all have ended.

    Args:
        client: The connection.
        cells: Those that are to be computed.
        submissions: What ``submissions_of`` returned.
        experiment: Experiment of Kubeflow Pipelines that the runs belong to; created if needed.
        parallel: Most runs that have not ended at a time.
        poll_s: Pause between two rounds of questions.
        trust_runs: Whether a run that has succeeded is not started again.
        say: Shows a line of progress.

    Returns:
        The key of each cell whose run has failed to the reason.

    Raises:
        ClusterError: If the cluster cannot be reached or refuses. Runs that have started continue.
    """
    place = experiment_id(client, experiment)
    waiting, active, failed = list(cells), list[_Active](), dict[str, str]()
    for cell in cells:  # first all that an earlier command has started, so that they count
        run = _latest(client, place, cell.key)
        if run and (run.state not in ENDED or (trust_runs and run.state == "SUCCEEDED")):
            waiting.remove(cell)
            active.append(_active(cell, str(run.run_id), submissions))
            say(f"{cell.name}: found {client.link('runs', run.run_id)}")
    while waiting or active:
        while waiting and len(active) < parallel:
            cell = waiting.pop(0)
            run_id, _ = start(client, submissions[cell.key], run_name=cell.key, experiment=experiment)
            active.append(_active(cell, run_id, submissions))
            say(f"{cell.name}: started {client.link('runs', run_id)}")
        for each in list(active):
            progress = ask(client, each.run_id, each.tasks, poll_s)
            trouble = progress.trouble.text if progress.trouble else ""
            if progress.state in ENDED:
                active.remove(each)
                if trouble:
                    failed[each.cell.key] = f"failed: {trouble} {client.link('runs', each.run_id)}"
                left = len(waiting) + len(active)
                say(f"{each.cell.name}: {failed.get(each.cell.key, 'succeeded')}; {left} left")
            elif trouble and progress.trouble and progress.trouble.about != each.said:
                each.said = progress.trouble.about
                say(f"{each.cell.name}: {trouble}")
        if active:
            time.sleep(poll_s)
    return failed


def _active(cell: Cell, run_id: str, submissions: dict[str, Submission]) -> _Active:
    return _Active(cell=cell, run_id=run_id, tasks=dict(submissions[cell.key].package.tasks))


def _latest(client: Client, experiment: str, name: str) -> Any:
    """Return the newest run of a name, None if there is none."""
    with client.asked():
        found = pages(
            client.list_runs, "runs", experiment_id=experiment, sort_by="created_at desc", filter=named(name)
        )
        return next(found, None)
