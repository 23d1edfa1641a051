"""Which settings are part of a run's identity, and the hash of them.

A field names its kind in its metadata: ``field(default=8, metadata=HOW)``. Without one it is of its section's
kind, and a section without one changes the result.
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
"""Only changes how something is computed: memory, time, the order of additions."""
MEASURED: Mapping[str, Kind] = {_KIND: "measured"}
"""Only changes what is measured."""
PLACE: Mapping[str, Kind] = {_KIND: "place"}
"""Where a run is stored, shown and computed, and what things are called."""

_FORMERLY = "formerly"


def formerly(value: Any) -> Mapping[str, Any]:
    """Return the metadata of a setting that changes the result, which older versions lacked or set otherwise.

    Args:
        value: What they did. Runs of theirs keep it, and a recipe that asks for it has the key that it had.
    """
    return {_KIND: "result", _FORMERLY: value}


ALGORITHM_VERSION = 1
"""Part of every key. Raise it if equal settings give another result than before, beyond rounding: another
formula, draw, data order, or default of a setting that changes the result. Every run then starts over under a
new key. A new setting needs no new version if its default leaves the result alone, or if it is ``formerly``
something else."""


def digest_of_kind(settings: Any, kind: Kind, **also: Any) -> str:
    """Return the sha256 of ``also`` and of the settings of a kind that differ from their defaults."""
    counted = {"algorithm": ALGORITHM_VERSION, "settings": settings_of_kind(settings, kind), **also}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def settings_of_kind(settings: Any, kind: Kind, inherited: Kind = "result") -> dict[str, Any]:
    """Return the settings of a kind that differ from their defaults, as a recipe holds them.

    A field without a kind of its own is of kind ``inherited``. A setting that was ``formerly`` something else
    counts if it differs from that.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        own = field.metadata.get(_KIND, inherited)
        value = getattr(settings, field.name)
        default = field.metadata.get(_FORMERLY, field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(value):
            inner = settings_of_kind(value, kind, own)
            if inner or (own == kind and default is None):
                found[field.name] = inner
        elif own == kind and value != default:
            sections = isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
            found[field.name] = [settings_of_kind(item, kind, kind) for item in value] if sections else value
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
