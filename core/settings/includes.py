"""Recipe files: each may include others, and its own settings override theirs.

Mappings are merged key by key; lists and scalars are replaced. A mapping that is empty, or has the tag
``!replace``, is not merged: it replaces the one below. A file that is reached twice counts once, below all
files that include it.
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
"""What PyYAML raises, and Python at a date such as 2026-02-30, at too many digits or brackets."""

_TAG = "!replace"
_MOST_VALUES = 100_000
"""Of one file; what its aliases repeat counts each time."""


class _Whole(dict[Any, Any]):
    """A mapping that is not merged with the one below it."""


@dataclass(frozen=True, kw_only=True)
class RecipeFiles:
    """A recipe and the files that it includes, directly or not."""

    layers: tuple[tuple[Path, Mapping[str, Any]], ...]
    """Each file's own settings; later files override earlier ones, and the recipe is the last."""

    def merged(self) -> dict[str, Any]:
        """Return the settings of all files together."""
        result: dict[str, Any] = {}
        for _, data in self.layers:
            result = _merge(result, data)
        return result

    def located(self, problem: str, overrides: Mapping[str, Any]) -> str:
        """Head a problem, which begins with a setting's full name, by the included file that sets it.

        Settings of the recipe itself and of ``overrides`` need no file's name.
        """
        found = [
            (len(name), height)
            for height, data in enumerate((*(data for _, data in self.layers), overrides))
            for name in _names(data)
            if re.match(rf"{re.escape(name)}(?![\w.])", problem)
        ]
        included = found and max(found)[1] < len(self.layers) - 1
        return f"{self.layers[max(found)[1]][0]}: {problem}" if included else problem


def read_recipe(path: Path) -> RecipeFiles:
    """Read a recipe and the files under its ``include:``, relative to it.

    Raises:
        SettingsError: With every file that cannot be read, is not YAML, includes itself, or has a malformed
            ``include``.
    """
    problems: list[str] = []
    layers: list[tuple[Path, Mapping[str, Any]]] = []
    known: set[str] = set()

    def read(path: Path, above: tuple[Path, ...]) -> None:
        way, place = (*above, path), os.path.realpath(path)
        circle = [i for i, file in enumerate(above) if os.path.realpath(file) == place]
        if circle:
            shown = " -> ".join(map(str, way[circle[0] :]))
            problems.append(f"recipe {path} includes itself: {shown}. Remove one of these includes.")
        elif place not in known:
            known.add(place)
            try:
                data = _read(path)
                for name in _included(path, data):
                    read(path.parent / name, way)
                layers.append((path, data))
            except SettingsError as error:
                problems.extend(error.problems)

    read(path, ())
    refuse(problems)
    return RecipeFiles(layers=tuple(layers))


def load_yaml(text: str) -> Any:
    """Read YAML with the tag ``!replace``.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: If it is not YAML (``NOT_YAML``).
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
    """Count the values in ``data``; raise a ``ValueError`` if it contains itself."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    if known.get(id(data)) == 0:
        raise ValueError("an alias lies inside the value it names")
    if inner and id(data) not in known:
        known[id(data)] = 0
        known[id(data)] = 1 + sum(_values(value, known) for value in inner)
    return known.get(id(data), 1)


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
    """Remove the names of the included files from a file's data, and return them."""
    given = data.pop("include", [])
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names):
        return names
    raise SettingsError(
        [f"include={given!r} in recipe {path} must be a file or a list of files, relative to the recipe."]
    )


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``above`` over ``below``, and mappings in both of them likewise."""
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
