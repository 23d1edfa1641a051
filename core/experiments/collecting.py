"""What the runs of an experiment have come to: found in the store by their settings, and made a table.

Nothing but the store is asked, so it does not matter where a run was computed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import StorageError
from core.experiments.definition import LAYER, Cell, Experiment
from core.experiments.layers import layer_studies
from core.machine.precision import SECTIONS
from core.report.tables import COSTS, DENSE, ResultTable, Row, figures_of
from core.runs.finding import stored_runs
from core.runs.overview import RunOverview
from core.runs.record import RunRecord, public_path
from core.runs.revisions import noted_revisions
from core.runs.run import Run
from core.settings.schema import Settings
from core.storage.interface import Store
from core.storage.layout import RECORD
from core.storage.publication import open_publication
from core.storage.store import open_store

_Sample = tuple[Mapping[str, str], Mapping[str, float]]
"""Labels, and the figures of one repetition."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A cell's run as the store has it."""

    state: str
    """``done``, ``running``, ``interrupted``, ..., with the phase; ``not started`` if there is no run."""
    run: Run | None = None
    record: RunRecord | None = None
    """What it measured; None until it is done."""


NOT_STARTED = Found(state="not started")


def found_runs(cells: Sequence[Cell]) -> dict[str, Found]:
    """Return the key of each cell to what its store holds of it.

    Raises:
        StorageError: If a store is not there, or cannot be read.
    """
    stores = {cell.settings.storage.store: cell.settings for cell in cells}
    found: dict[str, Found] = {}
    for uri, settings in stores.items():
        store = _opened(settings)
        found |= find_runs([cell for cell in cells if cell.settings.storage.store == uri], store)
    return found


def _opened(settings: Settings) -> Store:
    """Open the store of a cell.

    Raises:
        StorageError: If it is a folder that does not exist.
    """
    store = open_store(settings.storage.store)
    folder = store.local_path("")
    if folder is not None and not folder.is_dir():
        raise StorageError(
            f"storage.store={settings.storage.store} is not there, so there is nothing to collect. Run the "
            "experiment first, or name its store with --set storage.store=..."
        )
    return store


def done_runs(found: Mapping[str, Found]) -> dict[str, Run]:
    """Return the key of each cell that is done to its run."""
    return {key: each.run for key, each in found.items() if each.run and each.record}


def find_runs(cells: Sequence[Cell], store: Store, *, revision: str = "") -> dict[str, Found]:
    """Return the key of each cell to what a store holds of it.

    A run belongs to a cell if it was started with equal settings from the same base model. Of several, which
    began at different revisions of it, the last active one counts.

    Args:
        cells: Cells whose runs are in ``store``.
        store: The store.
        revision: Only runs that began at this revision of the base model count; "" takes any.

    Raises:
        StorageError: If the store cannot be read.
    """
    known: dict[tuple[str, ...], tuple[RunOverview, Run]] = {}
    for each in stored_runs(store):
        if each.run is not None and revision in ("", each.run.revision):
            known.setdefault(_identity(each.run.settings), (each.overview, each.run))
    runs = [run for _, run in known.values()]  # the last active first
    began = dict.fromkeys((run.revision, tuple(_precisions(run.settings).items())) for run in runs)
    found = {}
    for cell in cells:
        settled = (
            noted_revisions(_with_precisions(cell.settings, dict(precisions)), base, store)
            for base, precisions in began
        )
        match = next((s for s in settled if _identity(s) in known), None)
        found[cell.key] = _found(*known[_identity(match)], match) if match else NOT_STARTED
    return found


def table_of(
    experiment: Experiment, found: Mapping[str, Found], folder: Path, failed: Mapping[str, str]
) -> ResultTable:
    """Return the table of an experiment, with a row for each combination of labels, done or not.

    Args:
        experiment: The experiment.
        found: The key of each cell to what there is of it.
        folder: The experiment's output folder, with the studies of single layers.
        failed: The key of each cell that has just failed, to the reason.
    """
    labels = list(dict.fromkeys(tuple(cell.labels.items()) for cell in experiment.cells))
    if experiment.sensitivity:
        dense, samples = (
            [sample for study in studies for sample in study.samples()]
            for studies in layer_studies(experiment, done_runs(found), folder)
        )
    else:
        dense = list(_dense(experiment, found))
        done = [(cell, found[cell.key].record) for cell in experiment.cells]
        samples = [(cell.labels, figures_of(record, record.phases[-1])) for cell, record in done if record]
    rows = [_row(experiment, dict(place), dense) for place in dict.fromkeys(map(_place, dense))]
    places = dict.fromkeys(map(_place, samples))
    for own in labels:
        inner = [place for place in places if set(own) <= set(place)] or [own]
        rows += [_row(experiment, dict(place), samples) for place in inner]
    missing = [
        f"{cell.name}: {failed.get(cell.key) or found[cell.key].state}"
        for cell in experiment.cells
        if found[cell.key].record is None
    ]
    count = len(experiment.cells)
    return ResultTable(
        title=experiment.title,
        subtitle=f"Base model {experiment.base}; {count - len(missing)} of {count} runs are done",
        labels=(*experiment.axes, *([LAYER] if experiment.sensitivity else [])),
        metrics=experiment.metrics,
        rows=tuple(rows),
        notes=(*experiment.notes, *missing),
        picture=experiment.picture,
    )


def _precisions(settings: Settings) -> dict[str, str]:
    return {name: getattr(settings, name).precision for name in SECTIONS}


def _with_precisions(settings: Settings, precisions: Mapping[str, str]) -> Settings:
    """Return settings with the number formats that a run has settled on where they say ``auto``."""
    chosen = {
        name: dataclasses.replace(getattr(settings, name), precision=value)
        for name, value in precisions.items()
        if getattr(settings, name).precision == "auto"
    }
    return dataclasses.replace(settings, **chosen)


def _identity(settings: Settings) -> tuple[str, ...]:
    return settings.model.base, settings.model.revision, settings.digest()


def _found(overview: RunOverview, run: Run, settings: Settings) -> Found:
    run = dataclasses.replace(run, settings=settings)  # what is measured may differ from the run's last start
    if not run.is_complete():
        state = "measured under other settings" if overview.state == "done" else overview.state
        return Found(state=f"{state}, phase {overview.phase} of {overview.phases}", run=run)
    record = RunRecord.from_dict(open_publication(run.report_uri()).read_json(RECORD))
    return Found(state="done", run=run, record=record)


def _dense(experiment: Experiment, found: Mapping[str, Found]) -> Iterator[_Sample]:
    """Yield the figures of the base models; each run has measured its own."""
    axis = experiment.axes[0]
    records = {each.record.revision: each.record for each in found.values() if each.record}
    for record in records.values():
        name = f"{DENSE} {public_path(record.base)}" if len(records) > 1 else DENSE
        figures = figures_of(record, record.phases[0])
        yield {axis: name}, {name: figures[name] for name in figures if name not in COSTS}


def _place(sample: _Sample) -> tuple[tuple[str, str], ...]:
    return tuple(sample[0].items())


def _row(experiment: Experiment, labels: Mapping[str, str], samples: Sequence[_Sample]) -> Row:
    own = [figures for place, figures in samples if place == labels]
    asked = sum(cell.labels.items() <= labels.items() for cell in experiment.cells)
    published: dict[str, float] = {}
    for place, figures in experiment.published:
        if place.items() <= labels.items():
            published |= figures
    return Row(
        labels=labels,
        measured={
            metric: [figures[metric] for figures in own if metric in figures] for metric in experiment.metrics
        },
        published=published,
        repetitions=(len(own), asked or len(own)),
    )
