"""What an experiment is: a recipe, axes whose labels stand for settings, seeds, and how to show the result.

Each combination of labels and seed is a cell: one run of the pipeline, whose settings are those of the recipe
with overrides. An experiment is a YAML file, which may include others as recipes do.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import core
from core.errors import SettingsError, refuse
from core.report.tables import RUN_METRICS, Picture, published_value
from core.settings.includes import RecipeFiles, read_recipe
from core.settings.recipe import load_recipe
from core.settings.schema import Settings

SHIPPED = Path(core.__file__).parents[1] / "recipes" / "experiments"
"""The folder of the experiments that have names."""


LAYER, LAYER_METRICS = "layer", ("perplexity", "loss_increase")
"""The label and the metrics of a table of single layers."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A study of each cell's result, and of the base model: the loss when one layer alone is pruned."""

    sparsity: float = 0.5
    part: Literal["both", "mlp", "attention"] = "both"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others have published for this experiment."""

    base: str = ""
    """Their base model; with another one, the figures are left out and ``elsewhere`` holds."""
    source: str = ""
    """Where the figures stand."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Axis to label, and metric to figure; an axis that is left out means all its labels."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """The content of the YAML file, as ``docs/experiments.md`` explains it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    title: str
    recipe: str
    axes: dict[str, dict[str, dict[str, Any]]]
    metrics: list[str]
    set: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    picture: Picture | None = None
    sensitivity: Sensitivity | None = None
    published: Published = field(default_factory=Published)
    notes: list[str] = field(default_factory=list)
    elsewhere: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an experiment."""

    labels: Mapping[str, str]
    """Axis to label."""
    settings: Settings

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{_shown(self.labels)}, seed {self.settings.seed}"

    @property
    def key(self) -> str:
        """Its name for files and runs, with a digest of the settings: equal for equal settings and store."""
        settings = self.settings
        model, store = settings.model, settings.storage.store
        parts = [settings.digest(), settings.measured_digest(), model.base, model.revision, store]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
        return f"{re.sub('[^a-z0-9.]+', '-', self.name.lower()).strip('-')[:60]}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Cells, and how to show what they come to."""

    name: str
    title: str
    base: str
    """The base model of its recipe."""
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    metrics: tuple[str, ...]
    picture: Picture | None
    sensitivity: Sensitivity | None
    published: tuple[tuple[Mapping[str, str], Mapping[str, float]], ...]
    """Labels, and the figures that others have published for all rows with these labels."""
    notes: tuple[str, ...]


def shipped_experiments() -> dict[str, str]:
    """Return the name of each experiment that can be asked for by name, and its title.

    Raises:
        SettingsError: If they are not here.
    """
    if not SHIPPED.is_dir():
        raise SettingsError(
            [f"there is no {SHIPPED}: named experiments are files of the project. Work there, or name one."]
        )
    return {path.stem: read_recipe(path).merged()["title"] for path in sorted(SHIPPED.glob("*.yaml"))}


def find_experiment(name: str) -> Path:
    """Return the file of an experiment, named by its name or path.

    Raises:
        SettingsError: If there is none.
    """
    shipped = SHIPPED / f"{name}.yaml"
    if re.fullmatch(r"[\w.-]+", name) and shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    known = ", ".join(shipped_experiments())
    raise SettingsError([f"{name} is neither an experiment nor a file. Known experiments: {known}."])


def load_experiment(
    path: Path, overrides: Iterable[str] = (), *, seeds: int | None = None, only: Iterable[str] = ()
) -> Experiment:
    """Read an experiment and check the settings of all its cells.

    Args:
        path: The YAML file.
        overrides: ``section.key=value``, for all cells.
        seeds: How many seeds each combination of labels has; None takes the file's number.
        only: ``axis=label``; keeps the cells that have one of the labels given for each axis.

    Raises:
        SettingsError: With all that is wrong, and in which cell.
    """
    layers = tuple((place, _with_text_keys(data)) for place, data in read_recipe(path).layers)
    file = _parsed(path, layers)
    refuse(f"{path}: {problem}" for problem in _misplaced(file))
    overrides = tuple(overrides)
    recipe = path.parent / file.recipe
    base = load_recipe(recipe, (*_texts(file.set), *overrides)).model.base
    if base != file.published.base:
        file = _parsed(path, (*layers, (path, file.elsewhere)))
    cells, problems = [], dict[str, list[str]]()
    for labels, settings in _kept(file.axes, only):
        for seed in range(seeds or file.seeds):
            own = _texts({"name": f"{path.stem}, {_shown(labels)}", **file.set, **settings, "seed": seed})
            try:
                cells.append(Cell(labels=labels, settings=load_recipe(recipe, (*own, *overrides))))
            except SettingsError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(f"{_shown(labels)}, seed {seed}")
    refuse(f"cell {_listed(wrong)}: {problem}" for problem, wrong in problems.items())
    refuse(_alike(cells))
    others = [text for text in overrides if not text.startswith("evaluation.tasks")]  # which may narrow it
    asked = load_recipe(recipe, (*_texts(file.set), *others))
    evaluations = [settings.evaluation for settings in (asked, *(cell.settings for cell in cells))]
    tasks = {task for each in evaluations for task in (*each.tasks, *each.benchmarks())}
    refuse(f"{path}: {problem}" for problem in _unknown_columns(file, [*RUN_METRICS, *sorted(tasks)]))
    published = file.published.figures if base == file.published.base else []
    return Experiment(
        name=path.stem,
        title=file.title,
        base=base,
        axes=tuple(file.axes),
        cells=tuple(cells),
        metrics=tuple(file.metrics),
        picture=file.picture,
        sensitivity=file.sensitivity,
        published=tuple(_published(entry, file, path) for entry in published),
        notes=(*file.notes, *([f"Published: {file.published.source}"] if published else [])),
    )


def _parsed(path: Path, layers: tuple[tuple[Path, Mapping[str, Any]], ...]) -> _File:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(_File).validate_python(RecipeFiles(layers=layers).merged())
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg'].lower()}. Correct it there."
            for each in error.errors()
        ]
        raise SettingsError(problems) from None


def _misplaced(file: _File) -> Iterator[str]:
    """Yield what is empty, and settings that would have no effect or lose others."""
    if not file.axes:
        yield "axes: there is none. Name one with a label for each row, such as {method: {ours: {}}}."
    for axis, labels in file.axes.items():
        if not labels:
            yield f"axes.{axis}: has no label. Correct it there."
    if file.seeds < 1:
        yield f"seeds: {file.seeds} is no number of runs. Give 1 or more."
    sections = {each.name for each in fields(Settings) if each.default is MISSING}
    places = {"set": file.set}
    for axis, labels in file.axes.items():
        places |= {f"axes.{axis}.{label}": settings for label, settings in labels.items()}
    for place, settings in places.items():
        for name in settings:
            if name == "seed":
                yield f"{place}.seed: seeds are counted from 0. Leave it out, and give their number as seeds."
            elif name in sections:
                yield f"{place}.{name}: would replace the whole section. Write {name}.NAME in its place."


def _with_text_keys(data: Any) -> Any:
    """Return YAML's content with labels as text: ``0.02:`` is a number to YAML."""
    if isinstance(data, Mapping):
        return type(data)({str(key): _with_text_keys(value) for key, value in data.items()})  # type: ignore[call-arg]
    return [_with_text_keys(item) for item in data] if isinstance(data, list) else data


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as overrides; JSON is YAML."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def _kept(
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]], only: Iterable[str]
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield the labels of each wanted combination, and its settings; later axes override earlier ones."""
    wanted: dict[str, list[str]] = {}
    for text in only:
        axis, _, label = text.partition("=")
        if label not in axes.get(axis, {}):
            known = "; ".join(f"{name}={', '.join(labels)}" for name, labels in axes.items())
            raise SettingsError([f"--only {text} fits no cell. Known: {known}."])
        wanted.setdefault(axis, []).append(label)
    for chosen in itertools.product(*(wanted.get(axis, labels) for axis, labels in axes.items())):
        labels = dict(zip(axes, chosen, strict=True))
        settings = {k: v for axis, label in labels.items() for k, v in axes[axis][label].items()}
        yield labels, settings


def _alike(cells: Iterable[Cell]) -> Iterator[str]:
    """Yield cells that an override has made equal: they would be one run, shown twice."""
    seen: dict[tuple[str, str, str], Cell] = {}
    pairs = []
    for cell in cells:
        model = cell.settings.model
        first = seen.setdefault((cell.settings.digest(), model.base, model.revision), cell)
        if first is not cell:
            pairs.append(f"{first.name} and {cell.name}")
    if pairs:
        yield (
            f"cells {_listed(pairs)} have equal settings, but for what is measured, and so are one run. "
            "Leave out the --set that overrides what tells them apart, or correct the axes."
        )


def _unknown_columns(file: _File, known: list[str]) -> Iterator[str]:
    """Yield what the table or the picture shows and no run has: it would be told only after all of them."""
    labels = [*file.axes, *([LAYER] if file.sensitivity else [])]
    if file.sensitivity:
        known = list(LAYER_METRICS)
    shown = [("metrics", metric, known) for metric in file.metrics]
    if (picture := file.picture) is not None:
        shown += [("picture.x", picture.x, labels), ("picture.y", picture.y, file.metrics)]
        shown += [("picture.by", picture.by, ["", *labels])]
    for name, value, allowed in shown:
        if value not in allowed:
            yield f"{name}: {value} must be one of {', '.join(filter(None, allowed))}. Correct it there."


def _published(entry: Mapping[str, Any], file: _File, path: Path) -> tuple[dict[str, str], dict[str, float]]:
    labels = {axis: str(entry[axis]) for axis in file.axes if axis in entry}
    try:
        for axis, label in labels.items():
            if label not in file.axes[axis]:
                raise ValueError(f"{label!r} is no label of {axis}")
        figures = {
            metric: published_value(metric, str(text))
            for metric, text in entry.items()
            if metric not in labels
        }
    except ValueError as error:
        raise SettingsError([f"{path}: published.figures: {error}. Correct it there."]) from None
    return labels, figures


def _shown(labels: Mapping[str, str]) -> str:
    """Return labels for a name; a number alone would say nothing."""
    return ", ".join(f"{axis} {label}" if label[:1].isdigit() else label for axis, label in labels.items())


def _listed(names: list[str]) -> str:
    more = len(names) - 1
    return f"{names[0]} (and {more} more)" if more else names[0]
