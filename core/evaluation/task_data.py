"""lm-eval's tasks and their data, from the hub or from files on this machine."""

import difflib
import importlib.util
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from core.data.locations import locate
from core.errors import DataError
from core.evaluation.mini import MINI, write_mini_task
from core.settings.evaluation import EvaluationSettings
from core.settings.presets import PRESETS

if TYPE_CHECKING:
    import datasets
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

_CHECKED_ANSWERS = 20
_STAND_INS = ("validation", "valid", "val", "dev", "test")

# A task's, group's or tag's name in YAML: alone, as a list over several lines, or as a list in brackets.
_NAMES = re.compile(
    rb"""^["']?(task|group|tag)["']?:[ \t]*"""
    rb"""(?:["']?([^\s"'#\[]+)|((?:\r?\n[ \t]*-[ \t]*[^\r\n]+)+)|\[([^\]]*)\])""",
    re.MULTILINE,
)

# Data sets published with other columns than lm-eval's task reads.
_COLUMNS = {"boolq": {"doc_to_target": "{{ (label if label is defined else answer) | int }}"}}


def unknown_tasks(settings: EvaluationSettings) -> list[str]:
    """Check the names of the tasks beyond the presets: reads lm-eval's files, but does not import it.

    Returns:
        One sentence per task that lm-eval does not have; none where it is not installed.
    """
    known = {*MINI, *(each.task for preset in PRESETS.values() for each in preset)}
    named = [name for name in settings.benchmarks() if name not in known]
    if not named or importlib.util.find_spec("lm_eval") is None:
        return []
    files, collections = _catalog()
    wrong = [name for name in named if name not in files and name not in collections]
    return [_unknown(name, [*files, *collections, *PRESETS]) for name in wrong]


def task_problems(settings: EvaluationSettings) -> list[str]:
    """Check the tasks and the places of their data, without reading it; does not import lm-eval.

    Returns:
        One sentence per problem.
    """
    problems = unknown_tasks(settings)
    for name in settings.benchmarks():
        path = settings.data_of(name)
        if path is None:
            continue
        try:
            location = locate(path)
        except DataError as error:
            problems.append(f"evaluation.task_data.{name}: {error}")
            continue
        if location is None or not location.is_dir():
            problems.append(
                f"evaluation.task_data.{name}={path} is not a folder. Name one with a folder for each split."
            )
    return problems


def load_tasks(settings: EvaluationSettings, folder: Path) -> dict[str, dict[str, Any]]:
    """Build lm-eval's task objects with their data.

    Args:
        settings: Tasks, their number of examples, and where their data is.
        folder: An empty folder for task files.

    Returns:
        Name from ``settings.benchmarks()`` to ``{"tasks": {name: task}, "groups": {name: group}}``.

    Raises:
        DataError: If a task is unknown, or its data cannot be read or does not fit it.
    """
    if problems := task_problems(settings):
        raise DataError(*problems)
    from lm_eval.tasks import TaskManager

    files, _ = _catalog()
    wanted = settings.benchmarks()
    # lm-eval's own index of all tasks takes 8 s; only groups and tags need it.
    manager = TaskManager(include_defaults=any(name not in files and name not in MINI for name in wanted))
    loaded = {}
    for name in wanted:
        path, shots = settings.data_of(name), settings.shots_of(name)
        spec = str(files.get(name, name))
        if name in MINI and path is None:
            spec = str(write_mini_task(name, folder))
        elif path is not None:
            spec = _with_local_data(name, path, manager, shots, folder)
        with _load_errors(name, path):
            loaded[name] = manager.load([spec])
        for task in loaded[name]["tasks"].values():
            if path is not None:
                _check_answers(task, path)
            own = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=own if shots is None else shots)
    return loaded


@cache
def _catalog() -> tuple[dict[str, Path], frozenset[str]]:
    """Find the file of each of lm-eval's tasks and the names of its groups and tags, by a text search."""
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    roots = [Path(root) / "tasks" for root in package.submodule_search_locations or ()]
    files: dict[str, Path] = {}
    collections: set[str] = set()
    for folder, _, names in itertools.chain.from_iterable(os.walk(root) for root in roots):
        for name in names:
            if not name.endswith(".yaml") and "." in name:  # files to include have no suffix
                continue
            file = Path(folder, name)
            for kind, one, lines, inline in _NAMES.findall(file.read_bytes()):
                if kind != b"task":
                    collections.update(
                        re.findall(r"[\w./:+-]*\w[\w./:+-]*", (one or lines or inline).decode())
                    )
                elif one and file.suffix:
                    files.setdefault(one.decode(), file)
    return files, frozenset(collections)


def _unknown(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, set(known), n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists what there is."
    return f"evaluation.tasks: {name} is not one of lm-eval's tasks. {hint}"


@contextmanager
def _load_errors(name: str, path: str | None) -> Iterator[None]:
    """Turn whatever lm-eval, datasets and the hub raise into one line: they share no base class."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(". :")
        if path is None:
            advice = f"Check the network (HF_TOKEN for gated sets), or set evaluation.task_data.{name}"
        else:
            advice = f"Check that {path} has the columns of the data set that lm-eval's {name} reads"
        raise DataError(
            f"evaluation.tasks: the data of {name} cannot be loaded ({reason}). {advice}."
        ) from error


def _with_local_data(name: str, path: str, manager: "TaskManager", shots: int | None, folder: Path) -> str:
    """Make lm-eval's task, or a group's tasks, read local files; returns an argument for ``manager.load``."""
    from lm_eval.tasks import TaskManager

    location = locate(path)
    assert location is not None  # task_problems has seen it
    files, _ = _catalog()
    if name in files:
        config = TaskManager(include_defaults=False, include_path=files[name].parent).task_index[name].cfg
        return str(_local_task(name, config or {}, files[name], location, shots, folder))
    for member in _members(name, manager):
        entry = manager.task_index[member]
        entry.yaml_path = _local_task(member, entry.cfg or {}, files[member], location, shots, folder)
    return name


def _members(child: Any, manager: "TaskManager") -> list[str]:
    """List the tasks below a group's entry: a name, a list of entries, or a mapping to either."""
    if isinstance(child, Mapping):
        child = child.get("task") or child["group"]
    if isinstance(child, list):
        return [member for part in child for member in _members(part, manager)]
    entry = manager.task_index.get(child)
    if child in _catalog()[0] or entry is None:
        return [child] if entry is not None else []  # a group may define a task without a file
    return _members((entry.cfg or {}).get("task") or sorted(entry.tags), manager)


def _local_task(
    name: str, config: Mapping[str, Any], official: Path, location: Path, shots: int | None, folder: Path
) -> Path:
    """Write a task file that takes everything but the data from lm-eval's own.

    ``location`` holds one subfolder per split, or such a folder named as the task or as its subset.
    """
    own = (location / name, location / str(config.get("dataset_name")))
    location = next((folder for folder in own if folder.is_dir()), location)
    splits = {sub.name: str(sub) for sub in sorted(location.iterdir()) if sub.is_dir() and _data_files(sub)}
    if not splits:
        raise DataError(
            f"evaluation.task_data.{name}: {location} has no folder per split with {', '.join(_READERS)} "
            "files. Name the folder above validation/ or test/."
        )
    shots = config.get("num_fewshot") if shots is None else shots
    chosen = _choose_splits(name, config, splits, location, shots or 0)
    needed = {split: path for split, path in splits.items() if split in chosen.values()}
    task = {
        **{"include": str(official), "task": name, "tag": None, **chosen, **_COLUMNS.get(name, {})},
        "dataset_kwargs": {"split_folders": needed},
    }
    function = f"custom_dataset: !function {__name__}.{read_splits.__name__}\n"
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task) + function)
    return file


def _choose_splits(
    name: str, config: Mapping[str, Any], splits: Mapping[str, str], location: Path, shots: int
) -> dict[str, str | None]:
    """Keep the task's splits that exist; if none of them is for evaluation, take another and log it."""
    wanted = ("test_split", "validation_split", "training_split", "fewshot_split")
    chosen = {key: config[key] if config.get(key) in splits else None for key in wanted}
    if not shots:
        chosen["training_split"] = chosen["fewshot_split"] = None  # so that they are not read for nothing
    if not chosen["test_split"] and not chosen["validation_split"]:
        stand_in = next((split for split in _STAND_INS if split in splits), None)
        if stand_in is None and len(splits) > 1:
            raise DataError(
                f"evaluation.task_data.{name}: {location} holds {', '.join(splits)}, none of which is for "
                "testing. Rename the folder to evaluate on to validation."
            )
        chosen["validation_split"] = stand_in or next(iter(splits))
    evaluated = chosen["test_split"] or chosen["validation_split"]
    if chosen["fewshot_split"] == evaluated:
        chosen["fewshot_split"] = None  # lm-eval would give a question's own answer as an example
    examples = [config[key] for key in ("fewshot_split", "training_split") if config.get(key)]
    if shots and examples and not chosen["fewshot_split"] and not chosen["training_split"]:
        raise DataError(
            f"evaluation.task_data.{name}: {location} has no {' or '.join(examples)} folder for the {shots} "
            f"examples before each question. Add it, or set evaluation.shots.{name}=0."
        )
    official = config.get("test_split") or config.get("validation_split")
    if evaluated != official:
        log.info("%s: split %s is evaluated, because %s has no %s", name, evaluated, location, official)
    return chosen


def read_splits(split_folders: Mapping[str, str], **_: object) -> dict[str, "datasets.Dataset"]:
    """Read the splits of a data set into memory; lm-eval calls this for tasks with local data."""
    import datasets

    return {
        split: datasets.concatenate_datasets([_READERS[f.suffix](f) for f in _data_files(Path(folder))])
        for split, folder in split_folders.items()
    }


def _data_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in _READERS]


def _read_arrow(file: Path) -> "datasets.Dataset":
    import datasets

    # In memory, because a mapped file gets a cache file beside it.
    return datasets.Dataset.from_file(str(file), in_memory=True)


def _read_parquet(file: Path) -> "datasets.Dataset":
    import datasets
    import pyarrow.parquet

    return datasets.Dataset(pyarrow.parquet.read_table(file))


def _read_jsonl(file: Path) -> "datasets.Dataset":
    import datasets

    with file.open(encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])


_READERS: dict[str, Callable[[Path], "datasets.Dataset"]] = {
    ".arrow": _read_arrow,
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
}


def _check_answers(task: Any, path: str) -> None:
    """Refuse data with withheld answers (label -1): every item would count as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.config.process_results:
        return
    for number, item in enumerate(itertools.islice(task.eval_docs, _CHECKED_ANSWERS)):
        answer, choices = task.doc_to_target(item), task.doc_to_choice(item)
        if isinstance(answer, int) and not 0 <= answer < len(choices):
            raise DataError(
                f"evaluation.task_data.{task.task_name}={path}: item {number} has the answer {answer}, but "
                f"choices 0 to {len(choices) - 1}. Name a split whose answers are public."
            )
