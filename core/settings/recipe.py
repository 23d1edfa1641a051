"""Recipes: YAML files, command-line overrides and pipeline parameters become settings.

Everything that is wrong with a recipe is reported at once, each problem with the setting's full name.
"""

import dataclasses
import datetime
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from core.errors import SettingsError, refuse
from core.settings.includes import NOT_YAML, load_yaml, read_recipe
from core.settings.schema import Settings


def settings_from_dict(data: Mapping[str, Any]) -> Settings:
    """Build the settings from a recipe's content.

    Numbers may come back from KFP as floats and are made whole again.

    Raises:
        SettingsError: With every unknown key, wrong type, value out of range and impossible combination.
    """
    problems: list[str] = []
    settings = _build(Settings, data, "", problems)
    if problems:
        raise SettingsError(problems)
    assert isinstance(settings, Settings)
    return settings


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Settings:
    """Read a recipe with what it includes, and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        SettingsError: If a file is missing, is not YAML, or holds wrong settings. What an included file sets
            wrongly is told with that file's name.
    """
    files = read_recipe(path)
    data, own, problems = files.merged(), dict[str, Any](), list[str]()
    for override in overrides:
        try:
            _override(data, override)
            _override(own, override)
        except SettingsError as error:
            problems.extend(error.problems)
    try:
        settings = settings_from_dict(data)
    except SettingsError as error:
        problems.extend(files.located(problem, own) for problem in error.problems)
    refuse(problems)
    return settings


def with_fixed(recipe: Mapping[str, Any], fixed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Add to a recipe what was fixed when its pipeline was compiled.

    Args:
        recipe: Sections of settings.
        fixed: The same, of what is fixed.

    Raises:
        SettingsError: If the recipe says otherwise.
    """
    problems = [
        f"{section}={recipe[section]!r} must be a mapping."
        for section in ("model", *fixed)
        if not isinstance(recipe.get(section, {}), Mapping)
    ]
    refuse(problems)
    result = dict(recipe)
    for section, settings in fixed.items():
        given = recipe.get(section, {})
        result[section] = {**given, **settings}
        problems += [
            f"{section}.{key}={given[key]} is not what the pipeline was compiled for: {value}. Compile it "
            "anew with that, or leave it out."
            for key, value in settings.items()
            if key in given and given[key] != value
        ]
    refuse(problems)
    return result


def _override(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError([f"--set {override} must read section.key=value, such as prune.target=80%."])
    *sections, key = name.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise SettingsError([f"--set {override}: {section} is not a section."])
        data = inner
    try:
        data[key] = load_yaml(text) if text else ""  # YAML's empty value would be null
    except yaml.YAMLError:
        data[key] = text
    except NOT_YAML as error:
        raise SettingsError(
            [f"--set {name}={text[:100]} cannot be read: {error}. Correct it, or put text in quotes."]
        ) from None


_INVALID = object()
_LARGEST_BITS = 1000
"""Of a whole number: larger ones are no floats, and Python refuses to print the largest."""


def _build(cls: type, data: Any, prefix: str, problems: list[str]) -> Any:
    """Build dataclass ``cls`` from a mapping; problems are collected with full names, defaults stand in."""
    where = prefix.rstrip(".") or "the recipe"
    if not isinstance(data, Mapping):
        problems.append(f"{where}={data!r} must be a mapping of settings. Fill it in or leave it out.")
        return _INVALID
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    before = len(problems)
    for key, value in data.items():
        if key not in fields:
            problems.append(_unknown(prefix, key, fields))
            continue
        values[key] = _convert(hints[key], value, f"{prefix}{key}", problems)
    built = _INVALID
    try:
        built = cls(**{k: v for k, v in values.items() if v is not _INVALID})
    except SettingsError as error:
        # The default stands in for a value that is wrong already: what it leads to would only confuse.
        wrong = [key for key, value in values.items() if value is _INVALID]
        problems.extend(f"{prefix}{p}" for p in error.problems if not _mentions(p, wrong))
    return built if len(problems) == before else _INVALID


def _unknown(prefix: str, key: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known: {', '.join(known)}."
    return f"{prefix}{key} is not a setting. {hint}"


def _mentions(problem: str, keys: Iterable[str]) -> bool:
    """Tell whether what is wrong (not what to change) has to do with one of ``keys``."""
    what, _, _ = problem.partition(". ")
    return any(re.search(rf"\b{key}\b", what) for key in keys)


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """Convert a YAML or JSON ``value`` to the type ``hint`` of the setting ``name``."""
    if isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
        digits = math.ceil(value.bit_length() * math.log10(2))
        problems.append(f"{name} is a number of about {digits} digits, too large for any setting. Change it.")
        return _INVALID
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, name, problems)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.", problems)
    if origin is Literal:
        if value in args:
            return value
        problems.append(f"{name}={value} must be one of {', '.join(map(str, args))}. Choose one.")
        return _INVALID
    if origin is tuple:
        if isinstance(value, list | tuple):
            items = [_convert(args[0], item, f"{name}[{i}]", problems) for i, item in enumerate(value)]
            return _INVALID if _INVALID in items else tuple(items)
        problems.append(f"{name}={value!r} must be a list.")
        return _INVALID
    if origin is dict:
        if isinstance(value, Mapping):
            known = typing.get_args(args[0])  # a dict of named entries has a Literal for its keys
            unknown = [_unknown(f"{name}.", key, known) for key in value if known and key not in known]
            problems.extend(unknown)
            entries = {str(k): _convert(args[1], v, f"{name}.{k}", problems) for k, v in value.items()}
            return _INVALID if unknown or _INVALID in entries.values() else entries
        problems.append(f"{name}={value!r} must be a mapping.")
        return _INVALID
    return _convert_scalar(hint, value, name, problems)


def _convert_scalar(hint: type, value: Any, name: str, problems: list[str]) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, datetime.date):  # YAML's reading of a name such as 2026-02-03
        return str(value)
    if hint is str and number:
        return str(int(value)) if float(value).is_integer() else str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint is float and number:
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML reads 2e-5 (without a dot) as a string
            return float(value)
        except ValueError:
            pass
    problems.append(f"{name}={value!r} must be of type {hint.__name__}.")
    return _INVALID
