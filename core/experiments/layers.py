"""Studies of single layers: what results and base models of an experiment lose when one layer is pruned."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.experiments.definition import LAYER, LAYER_METRICS, Cell, Experiment
from core.report.tables import DENSE
from core.runs.record import public_path
from core.runs.run import Run
from core.settings.schema import Settings


@dataclass(frozen=True, kw_only=True)
class LayerStudy:
    """A study of each single layer of a checkpoint."""

    labels: Mapping[str, str]
    """Where its figures stand in the table."""
    uri: str
    """The checkpoint's publication."""
    settings: Settings
    """Of the run that it belongs to."""
    folder: Path
    """Named by all that its figures depend on."""

    @property
    def file(self) -> Path:
        """The file of its figures, which is there once it is done."""
        return self.folder / "sensitivity.json"

    def samples(self) -> Iterator[tuple[Mapping[str, str], Mapping[str, float]]]:
        """Yield labels and figures of each layer, pruned alone; nothing until it is done."""
        if not self.file.is_file():
            return
        for layer in json.loads(self.file.read_text())["layers"]:
            figures = {metric: layer[metric] for metric in LAYER_METRICS}
            labels = {**self.labels, LAYER: str(layer["layer"])}
            yield labels, {name: value for name, value in figures.items() if value is not None}


def layer_studies(
    experiment: Experiment, runs: Mapping[str, Run], folder: Path
) -> tuple[list[LayerStudy], list[LayerStudy]]:
    """Return the studies of the base models, and those of the results.

    A base model is studied once a seed, with the settings of the first run that is done.

    Args:
        experiment: One that asks for studies.
        runs: The key of each cell that is done to its run.
        folder: The experiment's output folder.
    """
    asked = dataclasses.asdict(experiment.sensitivity) if experiment.sensitivity else {}
    several = len({run.base_uri for run in runs.values()}) > 1

    def study(cell: Cell, uri: str, name: str, labels: Mapping[str, str]) -> LayerStudy:
        of = [uri, cell.settings.digest(), cell.settings.measured_digest(), asked]
        digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]
        return LayerStudy(labels=labels, uri=uri, settings=cell.settings, folder=folder / f"{name}-{digest}")

    dense, results = dict[tuple[str, int], LayerStudy](), list[LayerStudy]()
    for cell in experiment.cells:
        if (run := runs.get(cell.key)) is not None:
            seed, base = cell.settings.seed, cell.settings.model.base
            labels = {experiment.axes[0]: f"{DENSE} {public_path(base)}" if several else DENSE}
            dense.setdefault((run.base_uri, seed), study(cell, run.base_uri, f"{DENSE}-{seed}", labels))
            results.append(study(cell, run.uri("final"), cell.key, cell.labels))
    return [*dense.values()], results
