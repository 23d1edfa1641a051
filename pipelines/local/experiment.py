"""The cells of an experiment on this machine, one after another."""

import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from core.bases.importing import import_base
from core.errors import AdaptPrunerError
from core.experiments.collecting import Found, find_runs
from core.experiments.definition import Cell, Experiment
from core.quantities import seconds_text
from core.storage.store import open_store
from pipelines.local.folders import check_folders, holding_folder
from pipelines.local.run import run_local, with_absolute_store


def run_cells(
    experiment: Experiment, output: Path, console: Console
) -> tuple[dict[str, Found], dict[str, str]]:
    """Run what is not done; a cell that fails is reported, and the next one begins.

    Args:
        experiment: The experiment.
        output: Its folder; each cell has one in it.
        console: Where progress is shown.

    Returns:
        The key of each cell to what the store holds of it, and of each that failed to the reason.

    Raises:
        SettingsError: If a folder cannot be written; nothing has started then.
        LeaseError: If another process runs into the output folder.
        CheckpointError: If there is no such base model.
    """
    check_folders({f"--output={output}": output})
    failed: dict[str, str] = {}
    with holding_folder(output, f"--output={output}"):
        _say(console, f"base model {experiment.base}")
        before = found_here(experiment)
        left = [cell for cell in experiment.cells if before[cell.key].record is None]
        _say(console, f"{len(experiment.cells)} runs, of which {len(experiment.cells) - len(left)} are done")
        started = time.monotonic()
        for number, cell in enumerate(left, 1):
            _say(console, f"run {number} of {len(left)}: {cell.name}")
            try:
                run_local(cell.settings, output / cell.key, console)
            except AdaptPrunerError as error:
                failed[cell.key] = f"failed: {error}"
                _say(console, f"{cell.name} {failed[cell.key]}", "red")
            mean = (time.monotonic() - started) / number
            if number < len(left):
                _say(
                    console,
                    f"{seconds_text(mean)} a run; about {seconds_text(mean * (len(left) - number))} left",
                )
    return found_here(experiment), failed


def found_here(experiment: Experiment) -> dict[str, Found]:
    """Return what the stores hold of each cell, begun at the present revision of its base model.

    Base models that are not in the store are imported.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in experiment.cells:
        model = cell.settings.model
        groups.setdefault((cell.settings.storage.store, model.base, model.revision), []).append(cell)
    found: dict[str, Found] = {}
    for cells in groups.values():
        settings = with_absolute_store(cells[0].settings)
        store = open_store(settings.storage.store)
        _, revision = import_base(settings.model, store.uri, tracking_uri=settings.tracking.uri)
        found |= find_runs(cells, store, revision=revision)
    return found


def _say(console: Console, text: str, style: str = "bold") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
