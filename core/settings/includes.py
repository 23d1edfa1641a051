"""Recipe files: each may include others, and what it says itself is laid over what they say.

Mappings are merged key by key; lists and single values are replaced. A mapping that is empty, or has the tag
``!replace``, is not merged: it replaces what the files below it say there. A file that is reached twice
counts once, below all that include it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.errors import SettingsError, refuse

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: also what Python does of a date such as 2026-02-30, of too many digits or brackets."""

_TAG = "!replace"
_MOST_VALUES = 100_000
"""Of one file, what its aliases repeat counted each time."""


class _Whole(dict[Any, Any]):
    """A mapping that is not merged with what is below it."""


@dataclass(frozen=True, kw_only=True)
class RecipeFiles:
    """A recipe and the files that it includes, directly or not.

    Attributes:
        layers: What each file says itself; later ones lie over earlier ones, and the recipe is the last.
    """

    layers: tuple[tuple[Path, Mapping[str, Any]], ...]

    def merged(self) -> dict[str, Any]:
        """Return what they say together."""
        result: dict[str, Any] = {}
        for _, data in self.layers:
            result = _merge(result, data)
        return result

    def located(self, problem: str, overrides: Mapping[str, Any]) -> str:
        """Return what is wrong with a setting, headed by the included file that sets it.

        Args:
            problem: Begins with the full name of the setting.
            overrides: Lie over the recipe.
        """
        paths = [*(path for path, _ in self.layers[:-1]), None, None]
        found = [
            (len(name), height)
            for height, data in enumerate((*(data for _, data in self.layers), overrides))
            for name in _names(data)
            if re.match(rf"{re.escape(name)}(?![\w.])", problem)
        ]
        path = paths[max(found)[1]] if found else None
        return problem if path is None else f"{path}: {problem}"


def read_recipe(path: Path) -> RecipeFiles:
    """Read a recipe and the files under its ``include:``, relative to it.

    Raises:
        SettingsError: With every file that cannot be read, is not YAML, includes itself, or does not say
            properly what it includes.
    """
    reader = _Reader()
    reader.read(path, ())
    refuse(reader.problems)
    return RecipeFiles(layers=tuple(reader.layers))


def load_yaml(text: str) -> Any:
    """Read YAML with the tag ``!replace``.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: If it is none (``NOT_YAML``).
    """
    data = yaml.load(text, _Loader)  # a SafeLoader
    if _values(data, {}) > _MOST_VALUES:
        raise ValueError(f"with its aliases it holds over {_MOST_VALUES:,} values")
    return data


class _Loader(yaml.SafeLoader):
    """Knows ``!replace``."""


def _replacing(loader: _Loader, node: yaml.Node) -> _Whole:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(
            None, None, f"{_TAG} belongs before a mapping, all else is replaced anyway", node.start_mark
        )
    return _Whole(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(_TAG, _replacing)


def _values(data: Any, known: dict[int, int]) -> int:
    """Count what ``data`` holds.

    Raises:
        ValueError: If it holds itself.
    """
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    if known.get(id(data)) == 0:
        raise ValueError("an alias stands within what it names")
    if inner and id(data) not in known:
        known[id(data)] = 0
        known[id(data)] = 1 + sum(_values(value, known) for value in inner)
    return known.get(id(data), 1)


class _Reader:
    """Reads files and what they include, each once, and collects what is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.layers: list[tuple[Path, Mapping[str, Any]]] = []
        self._known = set[str]()

    def read(self, path: Path, above: tuple[Path, ...]) -> None:
        """Read a file and, before it, what it includes; ``above`` are the files that lead to it."""
        way, place = (*above, path), os.path.realpath(path)
        circle = [i for i, file in enumerate(above) if os.path.realpath(file) == place]
        if circle:
            shown = " -> ".join(map(str, way[circle[0] :]))
            self.problems.append(f"recipe {path} includes itself: {shown}. Remove one of these includes.")
        if place in self._known:
            return
        self._known.add(place)
        try:
            data = _read(path)
            names = _included(path, data)
        except SettingsError as error:
            self.problems.extend(error.problems)
            return
        for name in names:
            self.read(path.parent / name, way)
        self.layers.append((path, data))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = load_yaml(path.read_text())
    except OSError as error:
        raise SettingsError(
            [f"recipe {path} cannot be read ({error.strerror}). Give the path of a YAML file."]
        ) from None
    except NOT_YAML as error:
        raise SettingsError(
            [f"recipe {path} is not valid YAML: {' '.join(str(error).split())}. Correct it there."]
        ) from None
    if not isinstance(data, dict):
        raise SettingsError([f"recipe {path} must be a mapping of sections such as model: and prune:."])
    return data


def _included(path: Path, data: dict[str, Any]) -> list[str]:
    """Take the names of the files that a file includes out of its data."""
    given = data.pop("include", [])
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names):
        return names
    raise SettingsError(
        [f"include={given!r} in recipe {path} must be a file or a list of files, relative to the recipe."]
    )


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``above`` over ``below``; mappings that both hold are merged in turn."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        over = above[key]
        if isinstance(below[key], dict) and isinstance(over, dict) and over and not isinstance(over, _Whole):
            merged[key] = _merge(below[key], over)
    return merged


def _names(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the full name of everything in ``data``."""
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
