"""What each setting is for the identity of a run, and what of the settings a key is made of.

A field of the settings says in its metadata what it is: ``field(default=8, metadata=HOW)``. One that says
nothing is what its section is, and a section that says nothing changes the result.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["result", "how", "measured", "place"]

_KIND = "kind"

HOW: Mapping[str, Kind] = {_KIND: "how"}
"""Only how something is computed: memory, time, and the order in which numbers are added."""
MEASURED: Mapping[str, Kind] = {_KIND: "measured"}
"""Only what is measured of the result."""
PLACE: Mapping[str, Kind] = {_KIND: "place"}
"""Where a run is kept, shown and computed, and what things are called."""

_FORMERLY = "formerly"


def formerly(value: Any) -> Mapping[str, Any]:
    """Return the metadata of a setting that changes the result and that older versions did not have.

    Args:
        value: What they did. Runs of theirs keep it, and a recipe that asks for it has the key that it had.
    """
    return {_KIND: "result", _FORMERLY: value}


ALGORITHM_VERSION = 1
"""Part of every key. Raise it if equal settings give another result than before, beyond rounding: another
formula, draw, order of the data or default of a setting that changes the result. Every run then begins again
under another key. A new setting needs no new version if its default leaves the result alone, or if it is
``formerly`` something else."""


def digest_of_kind(settings: Any, kind: Kind, **also: Any) -> str:
    """Return the sha256 of the settings of a kind, less those that stand at their default.

    Args:
        settings: All settings.
        kind: Which count.
        also: What else does.
    """
    counted = {"algorithm": ALGORITHM_VERSION, "settings": settings_of_kind(settings, kind), **also}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def settings_of_kind(settings: Any, kind: Kind, inherited: Kind = "result") -> dict[str, Any]:
    """Return the settings of a kind that differ from their defaults, as a recipe holds them.

    Of a setting that was ``formerly`` something else, from that.

    Args:
        settings: Settings, or a section of them.
        kind: Which are wanted.
        inherited: What a field is that says nothing.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        own = field.metadata.get(_KIND, inherited)
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            inner = settings_of_kind(value, kind, own)
            if inner or (own == kind and field.default is None):
                found[field.name] = inner
        elif own == kind and value != _default(field):
            found[field.name] = _plain(value, kind)
    return found


def with_former(cls: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that an older version may have stored, with what it did where it had no setting.

    Args:
        cls: The dataclass of the settings, or of a section.
        stored: Settings as ``dataclasses.asdict`` gives them.
    """
    found = dict(stored)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(found.get(field.name), Mapping):
            found[field.name] = with_former(hints[field.name], found[field.name])
        elif _FORMERLY in field.metadata:
            found.setdefault(field.name, field.metadata[_FORMERLY])
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if _FORMERLY in field.metadata:
        return field.metadata[_FORMERLY]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any, kind: Kind) -> Any:
    if isinstance(value, tuple):
        return [
            settings_of_kind(item, kind, kind) if dataclasses.is_dataclass(item) else item for item in value
        ]
    return value
