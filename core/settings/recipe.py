"""Recipes: YAML files, command-line overrides and pipeline parameters become settings.

All problems of a recipe are reported at once, each with the setting's full name.
"""

import contextlib
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
    """Build the settings from a recipe's content; integers that KFP made floats are integers again.

    Raises:
        SettingsError: With every unknown key, wrong type, value out of range and impossible combination.
    """
    problems: list[str] = []
    settings = _build(Settings, data, "", problems)
    refuse(problems)
    return typing.cast(Settings, settings)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Settings:
    """Read a recipe and its includes, and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        SettingsError: If a file is missing, is not YAML, or holds wrong settings; those of an included file
            are reported with its name.
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
    """Add to a recipe the settings that were fixed when its pipeline was compiled.

    Raises:
        SettingsError: If the recipe contradicts them.
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
            "again with that, or leave it out."
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
"""Of an integer: larger ones are not floats, and Python refuses to print the largest."""


def _build(cls: type, data: Any, prefix: str, problems: list[str]) -> Any:
    """Build dataclass ``cls`` from a mapping; problems are collected with full names, defaults stand in.

    No library serves: pydantic stops at a section's first wrong type, so that its ranges go unchecked, and
    takes "yes" for a bool.
    """
    if not isinstance(data, Mapping):
        where = prefix.rstrip(".") or "the recipe"
        problems.append(f"{where}={data!r} must be a mapping of settings. Fill it in or leave it out.")
        return _INVALID
    hints = typing.get_type_hints(cls)
    before = len(problems)
    problems += [_unknown(prefix, key, hints) for key in data if key not in hints]
    values = {
        key: _convert(hints[key], value, f"{prefix}{key}", problems)
        for key, value in data.items()
        if key in hints
    }
    built = _INVALID
    try:
        built = cls(**{k: v for k, v in values.items() if v is not _INVALID})
    except SettingsError as error:
        # The default stands in for a value that is wrong already: what follows from it would only confuse.
        wrong = [key for key, value in values.items() if value is _INVALID]
        problems.extend(f"{prefix}{p}" for p in error.problems if not _mentions(p, wrong))
    return built if len(problems) == before else _INVALID


def _unknown(prefix: str, key: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known: {', '.join(known)}."
    return f"{prefix}{key} is not a setting. {hint}"


def _mentions(problem: str, keys: Iterable[str]) -> bool:
    """Return whether the problem itself, not its advice, is about one of ``keys``."""
    what, _, _ = problem.partition(". ")
    return any(re.search(rf"\b{key}\b", what) for key in keys)


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """Convert a YAML or JSON ``value`` to the type ``hint`` of the setting ``name``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
        digits = math.ceil(value.bit_length() * math.log10(2))
        problem = f" is a number of about {digits} digits, too large for any setting. Change it."
    elif origin in (types.UnionType, typing.Union):
        inner = next(a for a in args if a is not type(None))
        return None if value is None else _convert(inner, value, name, problems)
    elif dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.", problems)
    elif origin is Literal:
        if value in args:
            return value
        problem = f"={value} must be one of {', '.join(map(str, args))}. Choose one."
    elif origin is tuple:
        if isinstance(value, list | tuple):
            items = [_convert(args[0], item, f"{name}[{i}]", problems) for i, item in enumerate(value)]
            return _INVALID if _INVALID in items else tuple(items)
        problem = f"={value!r} must be a list."
    elif origin is dict:
        if isinstance(value, Mapping):
            known = typing.get_args(args[0])  # a dict of named entries has a Literal for its keys
            unknown = [_unknown(f"{name}.", key, known) for key in value if known and key not in known]
            problems.extend(unknown)
            entries = {str(k): _convert(args[1], v, f"{name}.{k}", problems) for k, v in value.items()}
            return _INVALID if unknown or _INVALID in entries.values() else entries
        problem = f"={value!r} must be a mapping."
    else:
        scalar = _scalar(hint, value)
        if scalar is not _INVALID:
            return scalar
        problem = f"={value!r} must be of type {hint.__name__}."
    problems.append(f"{name}{problem}")
    return _INVALID


def _scalar(hint: type, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str and isinstance(value, str | datetime.date):  # YAML takes 2026-02-03 for a date
        return str(value)
    if hint is str and number:
        return str(int(value)) if float(value).is_integer() else str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint is float and (number or isinstance(value, str)):  # YAML reads 2e-5 (without a dot) as a string
        with contextlib.suppress(ValueError):
            return float(value)
    return _INVALID
